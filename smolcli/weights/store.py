"""The model store: complete model folders under SMOL_HOME, each put there in one rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolcli import settings
from smolcli.errors import ModelError, ModelNotFound

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


@dataclass(frozen=True, slots=True)
class Item:
    """One folder of the store; `files` None: it is damaged."""

    name: str
    folder: Path
    files: ModelFiles | None
    num_bytes: int

    def facts(self) -> dict[str, Any]:
        """Name, size, source and revision; the last two None where it is damaged."""
        return {
            "name": self.name,
            "bytes": self.num_bytes,
            "source": self.files.source if self.files else None,
            "revision": self.files.revision if self.files else None,
        }


def items() -> Iterator[Item]:
    """Every model of the store, by name."""
    for folder in sorted(models_folder().glob("[!.]*")):
        name = str(record(folder).get("model") or folder.name)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield Item(name, folder, stored(name), num_bytes)


def find(name: str) -> Item:
    """The model that the store holds under a name.

    Raises:
        ModelNotFound: naming those that it holds.
    """
    held = list(items())
    for item in held:
        if name in (item.name, item.folder.name):
            return item
    names = ", ".join(item.name for item in held) or "none"
    raise ModelNotFound(f"the store has no model {name!r}; it holds: {names}")


def remove(item: Item) -> None:
    """Delete a model from the store, once nobody puts it there any more."""
    with exclusively(item.name) as scratch:
        item.folder.rename(scratch / "removed")


def record(folder: Path) -> dict[str, Any]:
    """What was written down of a model when it was put into the store."""
    try:
        values = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def fault(folder: Path) -> str | None:
    """What is wrong with a model's files, None if they are whole.

    In the store they must be those that were put there, size and sha256; elsewhere, weights of
    the size that their header tells.
    """
    if missing := missing_file(folder):
        return f"{missing} is missing"
    for name, digest in record(folder).get("sha256", {}).items():
        try:
            if sha256_of(folder / name) != digest:
                return f"{name} is not what was put there: its sha256 differs"
        except ModelError as exc:
            return str(exc)
    return next(filter(None, map(_weights_fault, sorted(folder.glob("*.safetensors")))), None)


def _weights_fault(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as exc:
        return f"{path.name} is damaged: {exc}"


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a model."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
