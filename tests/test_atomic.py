"""Files that other processes see whole or not at all."""

from pathlib import Path

import pytest

from smolcli.atomic import replacing, write_atomically
from smolcli.errors import RunError


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Nothing ever removed it from the model store."""
    (tmp_path / "taken").mkdir()
    with pytest.raises((IsADirectoryError, PermissionError)):
        write_atomically(tmp_path / "taken", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def write_half(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"ne")
        raise ZeroDivisionError


def test_an_exception_keeps_the_previous_file(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "link")
    assert (tmp_path / "real").read_text() == "old"
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unwritable_file_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"), replacing(tmp_path / "no" / "file"):
        pass
