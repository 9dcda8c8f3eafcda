"""The model store: model directories under SMOL_HOME, each installed by an atomic rename."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolcli import settings
from smolcli.errors import ModelError, ModelNotFound, error_reason
from smolcli.protocol.json_text import parse_json, parse_object

RECORD = "smol.json"
# Quantized weights in their original file, and the offsets of the tensors in it.
GGUF_FILE, GGUF_INDEX = "model.gguf", "model.gguf.index.json"

Notify = Callable[[str], None]  # receives progress messages of one sentence


@dataclass(frozen=True)
class ModelFiles:
    """A complete model on the local disk.

    Args:
        model: its name.
        folder: the directory that holds its files.
        revision: changes whenever the model's answers could change.
        source: where it came from: `hub`, `pypi`, `gguf` or `folder`.
    """

    model: str
    folder: Path
    revision: str
    source: str


def missing_file(folder: Path) -> str | None:
    """The first file that `folder` needs to be a complete model but lacks; None if complete.

    Raises:
        ModelError: the index of a sharded checkpoint is malformed.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            return name
    gguf_files = (GGUF_FILE, GGUF_INDEX)
    if any((folder / name).is_file() for name in gguf_files):
        return next((name for name in gguf_files if not (folder / name).is_file()), None)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None if any(folder.glob("*.safetensors")) else "model.safetensors"
    shards = shard_names(index)
    return next((shard for shard in shards if not (folder / shard).is_file()), None)


def shard_names(index: Path) -> list[str]:
    """The sorted names of the files that make up a sharded checkpoint.

    Raises:
        ModelError: the index is malformed or cannot be read.
    """
    try:
        names = set(parse_json(index.read_text("utf-8"))["weight_map"].values())
        return [str(name) for name in sorted(names)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelError(f"{index} is not a valid checkpoint index: {exc}") from exc


def sha256_of(*paths: Path) -> str:
    """The SHA-256 digest of the concatenated contents of `paths`, in hex.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as exc:
            raise ModelError(f"cannot read {path}: {error_reason(exc)}") from exc
    return digest.hexdigest()


def stored(name: str) -> ModelFiles | None:
    """The model stored under `name`; None if the store has no complete one."""
    folder = models_folder() / _folder_name(name)
    try:
        values = parse_json((folder / RECORD).read_text("utf-8"))
        found = ModelFiles(values["model"], folder, values["revision"], values["source"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if missing_file(folder) is None else None


@contextmanager
def locked_scratch(name: str) -> Iterator[Path]:
    """Hold the store's lock on `name` and yield an empty scratch directory.

    The directory is deleted afterwards. Anything that a killed process left in it is deleted
    first.

    Raises:
        ModelError: the store is not writable.
    """
    from filelock import FileLock  # late: it imports asyncio

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
        reason = error_reason(exc)
        raise ModelError(f"cannot write to the model store {models_folder()}: {reason}") from exc


def install(
    files: ModelFiles,
    created_with: dict[str, str],
    scratch: Path,
    quantization: str | None = None,
) -> ModelFiles:
    """Move the finished `files.folder` to its final path in the store.

    The caller holds the store's lock on `files.model`.

    Args:
        files: the model; its folder lies inside `scratch`.
        created_with: versions of the libraries that wrote the files.
        scratch: the directory that `locked_scratch` yielded.
        quantization: the number format of the file that the weights were converted from, if any.

    Returns:
        The same model at its final location.
    """
    built, folder = files.folder, models_folder() / _folder_name(files.model)
    assert missing_file(built) is None, built
    record = {"model": files.model, "source": files.source, "revision": files.revision}
    contents = sorted(path for path in built.iterdir() if path.name != RECORD)  # which is replaced
    digests = {path.name: sha256_of(path) for path in contents}
    if quantization is not None:
        record["quantization"] = quantization
    whole_record = record | {"created_with": created_with, "sha256": digests}
    text = json.dumps(whole_record, indent=2) + "\n"
    (built / RECORD).write_text(text, "utf-8")
    for path in built.iterdir():
        _fsync(path)
    if folder.exists():  # only a damaged model is ever rebuilt
        folder.rename(scratch / "damaged")
    built.rename(folder)
    return replace(files, folder=folder)


def models_folder() -> Path:
    """The directory that holds the store's models, one subdirectory each."""
    return settings.smol_home() / "models"


def _folder_name(name: str) -> str:
    return name.replace("/", "--")


def _fsync(path: Path) -> None:
    """Flush a file to disk, so that a power failure after the rename cannot leave it empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One model directory of the store; `files` is None if the model is damaged."""

    name: str
    folder: Path
    files: ModelFiles | None
    num_bytes: int

    def summary(self) -> dict[str, Any]:
        """Name, size, format, source and revision; the last two are None for a damaged model."""
        return {
            "name": self.name,
            "bytes": self.num_bytes,
            "format": weight_format(self.folder),
            "source": self.files.source if self.files else None,
            "revision": self.files.revision if self.files else None,
        }


def entries() -> Iterator[StoreEntry]:
    """All models in the store, sorted by directory name.

    Raises:
        ModelError: the store cannot be read.
    """
    store = models_folder()
    try:
        folders = sorted(store.iterdir())
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ModelError(
            f"cannot read the model store {store}: {error_reason(exc)}; "
            "set SMOL_HOME to a directory of your own"
        ) from exc
    for folder in folders:
        if folder.name.startswith("."):
            continue
        name = str(read_record(folder).get("model") or folder.name)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield StoreEntry(name, folder, stored(name), num_bytes)


def find_entry(name: str) -> StoreEntry:
    """The store's entry for a model, by its name or its directory's name.

    Raises:
        ModelNotFound: there is none; the message lists the models in the store.
    """
    found = list(entries())
    for entry in found:
        if name in (entry.name, entry.folder.name):
            return entry
    names = ", ".join(entry.name for entry in found) or "none"
    raise ModelNotFound(f"the store has no model {name!r}; models in the store: {names}")


def remove(entry: StoreEntry) -> None:
    """Delete a model from the store, waiting for a process that is installing it."""
    with locked_scratch(entry.name) as scratch:
        entry.folder.rename(scratch / "removed")


def read_record(folder: Path) -> dict[str, Any]:
    """What `install` recorded about the model in `folder`; empty if there is no valid record."""
    return read_json_record(folder / RECORD)


def read_json_record(path: Path) -> dict[str, Any]:
    """A JSON object that smol wrote; empty if the file is missing or damaged."""
    try:
        return parse_object(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def weight_format(folder: Path) -> str | None:
    """The number format of the weights in `folder`, such as "Q4_1 and Q8_0" or "bfloat16"."""
    if (folder / GGUF_FILE).is_file():
        return _gguf_format(folder)
    from safetensors import SafetensorError, safe_open

    from smolcli.engine.dtypes import FLOAT_DTYPES  # late: imports numpy

    dtypes: Counter[str] = Counter()
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="np") as file:
                for part in map(file.get_slice, file.keys()):
                    dtypes[part.get_dtype()] += math.prod(part.get_shape())
    except (SafetensorError, OSError):
        return None
    if not dtypes:
        return None
    most = dtypes.most_common(1)[0][0]
    quantization = read_record(folder).get("quantization")
    return FLOAT_DTYPES.get(most, most) + (f", from {quantization}" if quantization else "")


def _gguf_format(folder: Path) -> str | None:
    from smolcli.weights.gguf_weights import stored_types  # late: imports numpy

    try:
        kinds = stored_types(folder)
    except ModelError:
        return None
    return ", ".join([*kinds[:-2], " and ".join(kinds[-2:])])


def find_damage(folder: Path) -> str | None:
    """Check a model's files.

    Files in the store must match the digests taken at installation. Elsewhere, the size of each
    weight file must match its header.

    Returns:
        What is wrong, or None if the model is intact.
    """
    if missing := missing_file(folder):
        return f"{missing} is missing"
    for name, digest in read_record(folder).get("sha256", {}).items():
        try:
            if sha256_of(folder / name) != digest:
                return f"{name} has changed since it was installed: its SHA-256 digest differs"
        except ModelError as exc:
            return str(exc)
    return next(filter(None, map(_weights_damage, sorted(folder.glob("*.safetensors")))), None)


def _weights_damage(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as exc:
        return f"{path.name} is damaged: {exc}"


def file_sizes(folder: Path) -> dict[str, int]:
    """The size of each file of a model, in bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
