"""Model lookup: a directory, the Hugging Face cache or the store, each of them complete."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from model_stores import COMMIT, MODEL, entries, fill_cache, fill_store

from smolcli.errors import ModelError, ModelNotFound, UsageError
from smolcli.weights.resolve import resolve
from smolcli.weights.store import locked_scratch, stored

pytestmark = pytest.mark.usefixtures("home")


def test_local_directory_is_used_in_place(tiny_folder: Path, tmp_path: Path) -> None:
    found = resolve(str(tiny_folder))
    assert (found.folder, found.source) == (tiny_folder, "folder")
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    assert resolve(str(copy)).revision == found.revision
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text("utf-8") + " ", "utf-8")
    assert resolve(str(copy)).revision != found.revision


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_incomplete_directory_names_the_missing_file(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(ModelNotFound, match=f"has no {name}"):
        resolve(str(folder))


def test_missing_shard_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}')
    with pytest.raises(ModelNotFound, match=r"has no second\.safetensors"):
        resolve(str(folder))
    index.write_text("[]")
    with pytest.raises(ModelError, match="not a valid checkpoint index"):
        resolve(str(folder))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "a/b/c", "a b", "..", "~/nowhere", "~no such user/model", ""]
)
def test_path_is_never_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        resolve(name)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the user database")
def test_a_user_without_a_home_directory_is_told_to_set_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container that runs as a user without an entry in /etc/passwd; a traceback once."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("SMOL_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UsageError, match="set SMOL_HOME"):
        stored(MODEL)


def test_an_empty_name_is_not_the_current_directory() -> None:
    with pytest.raises(ModelNotFound, match="the name of the model is empty"):
        resolve("")


def test_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no such file: .*x\.gguf"):
        resolve(str(tmp_path / "x.gguf"))


def test_cache_comes_before_the_store(tiny_folder: Path, tmp_path: Path, home: Path) -> None:
    in_store = fill_store(home, tiny_folder)
    found = resolve(MODEL)
    assert (found.folder, found.revision, found.source) == (in_store, "abc", "pypi")
    in_cache = fill_cache(tmp_path, tiny_folder)
    found = resolve(MODEL)
    assert (found.folder, found.revision, found.source) == (in_cache, COMMIT, "hub")
    (in_cache / "model.safetensors").unlink()
    assert resolve(MODEL).folder == in_store


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes that are read")
def test_resolving_a_stored_model_does_not_read_its_weights(tiny_folder: Path, home: Path) -> None:
    weights = fill_store(home, tiny_folder) / "model.safetensors"
    resolve(MODEL)  # imports what it needs
    before = psutil.Process().io_counters().read_chars
    resolve(MODEL)
    assert psutil.Process().io_counters().read_chars - before < weights.stat().st_size


def test_resolving_imports_neither_torch_nor_the_hub_client(tiny_folder: Path, home: Path) -> None:
    fill_store(home, tiny_folder)
    code = (
        "import sys; from smolcli.weights.resolve import resolve; import smolcli.text.tokenizer; "
        f"resolve({MODEL!r}); "
        "print({'torch', 'transformers', 'httpx2', 'huggingface_hub.hf_api'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_leftovers_of_a_killed_pull_are_deleted(tiny_folder: Path, home: Path) -> None:
    code = (
        "import time; from smolcli.weights.store import locked_scratch\n"
        f"with locked_scratch({MODEL!r}) as scratch:\n"
        "    (scratch / 'half').mkdir(); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    assert entries(home) == [".tests--tiny.partial"]
    assert stored(MODEL) is None
    with locked_scratch(MODEL) as scratch:
        assert list(scratch.iterdir()) == []
    assert entries(home) == []


def test_unwritable_store_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMOL_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot write to the model store"), locked_scratch(MODEL):
        pass
