"""Packed weights: what the native kernels read, written once and shared by all processes.

Packing takes longer than anything else when a model is loaded, so the result is kept in the model
store, under SMOL_HOME/packed, and memory-mapped read-only. A file belongs to one model, one kernel
library and one version of smol; a record next to it describes its origin.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smolcli import __version__, settings
from smolcli.atomic import write_atomically
from smolcli.engine import quantized
from smolcli.engine.config import LlamaConfig
from smolcli.engine.native import packing
from smolcli.engine.native.bindings import Array, Kernels
from smolcli.engine.native.packing import pack_into, packed_layout
from smolcli.engine.quantized import Formats
from smolcli.errors import ModelError
from smolcli.weights.checkpoint import load_weights, weight_files
from smolcli.weights.store import ModelFiles, locked_scratch, read_json_record, sha256_of

MIN_BYTES = 16 << 20  # packing a smaller model in memory is as fast as mapping a file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file of packed weights.

    Args:
        path: its path.
        model: name of the model.
        kernels: the kernel library that reads it, such as "x86-64-v3-bfloat16".
        num_bytes: its size.
    """

    path: Path
    model: str
    kernels: str
    num_bytes: int

    def summary(self) -> dict[str, Any]:
        """Name, size and kernels, for a listing."""
        return {"name": self.model, "bytes": self.num_bytes, "kernels": self.kernels}


def packed_weights(
    files: ModelFiles,
    config: LlamaConfig,
    kernels: Kernels,
    formats: Formats,
    min_bytes: int = MIN_BYTES,
) -> Array | None:
    """Map the packed weights of a model, packing and storing them first if necessary.

    Concurrent callers, in this process or others, pack them only once.

    Args:
        files: the model.
        config: its config.json.
        kernels: the library to pack for.
        formats: the formats of the model's tensors.
        min_bytes: minimum size of packed weights that are stored.

    Returns:
        uint8 as `NativeModel.from_packed` takes it. None if the model is small, or the store is
        not writable: then pack in memory.

    Raises:
        ModelError: the weights are damaged or do not fit config.json.
    """
    num_bytes = packed_layout(config, kernels, formats).num_bytes
    if num_bytes < min_bytes:
        return None
    path = packed_path(files, config, kernels)
    if not _is_intact(path, num_bytes):
        weights = load_weights(files.folder, config)
        try:
            with locked_scratch(f"packed--{path.stem}") as scratch:
                if not _is_intact(path, num_bytes):  # not packed while this process waited
                    built = _mapped(scratch / "packed", num_bytes)
                    pack_into(built, config, weights, kernels)
                    built.flush()
                    _install(scratch / "packed", path, files, kernels)
        except (OSError, ModelError) as exc:
            logger.warning("cannot store packed weights, packing in memory instead: %s", exc)
            return None
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


def packed_path(files: ModelFiles, config: LlamaConfig, kernels: Kernels) -> Path:
    """Where the packed weights of a model are, or would be.

    Args:
        files: the model.
        config: its config.json.
        kernels: the library that reads them.
    """
    return packed_folder() / f"{_key(files, config, kernels)}.bin"


def packed_folder() -> Path:
    """The directory of all packed weights."""
    return settings.smol_home() / "packed"


def packed_files() -> Iterator[PackedFile]:
    """All packed weights in the store, by model."""
    found = []
    for path in packed_folder().glob("*.bin"):
        record = read_json_record(_record_path(path))
        model, kernels = str(record.get("model", "unknown")), str(record.get("kernels", ""))
        found.append(PackedFile(path, model, kernels, path.stat().st_size))
    yield from sorted(found, key=lambda file: (file.model, file.kernels))


def remove_packed(file: PackedFile) -> None:
    """Delete packed weights; processes that have mapped them keep them until they end."""
    for path in (_record_path(file.path), file.path.with_suffix(".kv"), file.path):
        path.unlink(missing_ok=True)


def _key(files: ModelFiles, config: LlamaConfig, kernels: Kernels) -> str:
    """A digest of everything that determines the packed bytes.

    Modification times count in whole seconds: the layers of container images keep no fractions.
    """
    stats = [path.stat() for path in weight_files(files.folder)]
    parts = [
        *(files.revision, repr(config), kernels.name, __version__, packing.__name__),
        *(f"{stat.st_size} {_whole_s(stat.st_mtime_ns)}" for stat in stats),
    ]
    digest = hashlib.sha256("\n".join(parts).encode())
    for module in (packing, quantized):
        with suppress(OSError):  # an installation may contain only compiled modules
            digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:32]


def _is_intact(path: Path, num_bytes: int) -> bool:
    """Whether a file is as it was written.

    The digest is checked only if the modification time differs from the record, because reading
    the whole file would cost more than packing saves.
    """
    record = read_json_record(_record_path(path))
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != num_bytes or record.get("bytes") != num_bytes:
        return False
    recorded_ns = record.get("modified_ns")
    if isinstance(recorded_ns, int) and stat.st_mtime_ns in (recorded_ns, _whole_s(recorded_ns)):
        return True
    if record.get("sha256") != sha256_of(path):
        return False
    with suppress(OSError):  # copied or touched: record the new time
        _write_record(path, record | {"modified_ns": stat.st_mtime_ns})
    return True


def _mapped(path: Path, num_bytes: int) -> np.memmap[Any, np.dtype[np.uint8]]:
    """Create a file and map it for writing.

    Its disk space is reserved first: on a full disk, a write to mapped memory kills the process.

    Raises:
        OSError: there is not enough space, or the file cannot be written.
    """
    with path.open("w+b") as file:  # readable, because glibc may emulate posix_fallocate
        file.truncate(num_bytes)
        if hasattr(os, "posix_fallocate"):  # on Linux; NTFS reserves the space of any new file
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
    return np.memmap(path, np.uint8, mode="r+")


def _whole_s(time_ns: int) -> int:
    """A modification time in ns as the layers of container images keep it."""
    return time_ns // 10**9 * 10**9


def _install(built: Path, path: Path, files: ModelFiles, kernels: Kernels) -> None:
    """Move packed weights to their final path and delete those that they replace."""
    with built.open("rb+") as file:
        os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    _record_path(path).unlink(missing_ok=True)
    built.replace(path)
    stat = path.stat()
    record = {
        "model": files.model,
        "revision": files.revision,
        "kernels": kernels.name,
        "bytes": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
        "sha256": sha256_of(path),
    }
    _write_record(path, record)
    for other in packed_files():
        if other.path != path and (other.model, other.kernels) == (files.model, kernels.name):
            with suppress(OSError):  # Windows does not delete what is mapped
                remove_packed(other)


def _write_record(path: Path, record: dict[str, Any]) -> None:
    write_atomically(_record_path(path), (json.dumps(record, indent=2) + "\n").encode())


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")
