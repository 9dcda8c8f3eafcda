"""The model store: complete model folders under SMOL_HOME, each put there in one rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from smolcli import settings
from smolcli.errors import ModelError

RECORD = "smol.json"

Report = Callable[[str], None]


@dataclass(frozen=True)
class ModelFiles:
    """A model on this disk, complete; `revision` changes when its answers could."""

    model: str
    folder: Path
    revision: str
    source: str


def missing_file(folder: Path) -> str | None:
    """The first file that `folder` lacks to be a whole model, None if it is one."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            return name
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None if any(folder.glob("*.safetensors")) else "model.safetensors"
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{index} is not a list of weight files: {exc}") from exc
    return next((shard for shard in shards if not (folder / shard).is_file()), None)


def sha256_of(*paths: Path) -> str:
    """The digest of the contents of files, one after the other.

    Raises:
        ModelError: if one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as exc:
            raise ModelError(f"{path} cannot be read: {exc.strerror}") from exc
    return digest.hexdigest()


def stored(name: str) -> ModelFiles | None:
    """The model that the store keeps under `name`, None if there is no whole one."""
    folder = models_folder() / _folder_name(name)
    try:
        values = json.loads((folder / RECORD).read_text("utf-8"))
        found = ModelFiles(values["model"], folder, values["revision"], values["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if missing_file(folder) is None else None


@contextmanager
def exclusively(name: str) -> Iterator[Path]:
    """Hold the store's lock on `name`; gives an empty scratch folder that is gone afterwards.

    What a killed process left in it is cleared first.
    """
    from filelock import FileLock  # late: it brings asyncio

    scratch = models_folder() / f".{_folder_name(name)}.partial"
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(scratch.with_suffix(".lock")):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as exc:
        raise ModelError(f"the model store {models_folder()} cannot be written: {exc}") from exc


def install(files: ModelFiles, created_with: dict[str, str], scratch: Path) -> ModelFiles:
    """Move the finished `files.folder`, inside `scratch`, to its place in the store.

    The caller holds the store's lock on `files.model`.
    """
    built, folder = files.folder, models_folder() / _folder_name(files.model)
    assert missing_file(built) is None, built
    record = {"model": files.model, "source": files.source, "revision": files.revision}
    digests = {path.name: sha256_of(path) for path in sorted(built.iterdir())}
    whole_record = record | {"created_with": created_with, "sha256": digests}
    text = json.dumps(whole_record, indent=2) + "\n"
    (built / RECORD).write_text(text, "utf-8")
    for path in built.iterdir():
        _to_disk(path)
    if folder.exists():  # a damaged one: an intact one is never rebuilt
        folder.rename(scratch / "damaged")
    built.rename(folder)
    return replace(files, folder=folder)


def models_folder() -> Path:
    """Where the store keeps models, a folder each."""
    return settings.smol_home() / "models"


def _folder_name(name: str) -> str:
    return name.replace("/", "--")


def _to_disk(path: Path) -> None:
    """After a power cut, a renamed folder must not hold empty files."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
