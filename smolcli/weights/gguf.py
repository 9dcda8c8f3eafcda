"""Reader of GGUF files: their metadata, and their tensors as memory-mapped bytes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smolcli.engine.quantized import Array

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4
NUMBERS = {  # of metadata values, by type id
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Args:
        type: the id of its number format, `gguf.GGMLQuantizationType`.
        shape: outermost dimension first.
        offset: where its bytes begin in the file.
        data: its bytes, memory-mapped.
    """

    type: int
    shape: tuple[int, ...]
    offset: int
    data: Array


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata and tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file; its tensors are memory-mapped.

    Raises:
        ValueError: it is not a valid GGUF file.
        OSError: it cannot be read.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    buffer = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    reader = _Reader(buffer.data)
    if reader.take(4) != MAGIC:
        raise ValueError("it is not a GGUF file")
    if (number := reader.number("<u4")) not in (2, 3):
        raise ValueError(f"GGUF version {number} is not supported")
    num_tensors, num_values = reader.number("<u8"), reader.number("<u8")
    metadata = {reader.string(): reader.value() for _ in reader.counted(num_values, 13)}
    entries = [reader.tensor() for _ in reader.counted(num_tensors, 24)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_id, offset in entries:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
        num_elements = int(np.prod([1, *shape], dtype=object))
        if not shape or shape[-1] % block or name in tensors:
            raise ValueError(f"the tensor {name!r} of shape {list(shape)} is invalid")
        first, last = start + offset, start + offset + num_elements // block * block_bytes
        if last > len(buffer):
            raise ValueError(f"it is truncated: the tensor {name!r} ends past the end of the file")
        tensors[name] = GgufTensor(type_id, shape, first, buffer[first:last])
    return GgufFile(metadata, tensors)


class _Reader:
    """Reads a GGUF header sequentially, checking every length against the size of the file."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self._buffer) - self.position:
            raise ValueError("it is truncated")
        self.position += num_bytes
        return bytes(self._buffer[self.position - num_bytes : self.position])

    def number(self, kind: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode("utf-8", "replace")

    def counted(self, count: int, min_bytes: int) -> range:
        """A range over `count` items of at least `min_bytes` each, which must fit in the file."""
        if count * min_bytes > len(self._buffer) - self.position:
            raise ValueError("it is truncated")
        return range(count)

    def value(self) -> Any:
        return self._typed(self.number("<u4"))

    def _typed(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(_number_type(kind))
        kind, count = self.number("<u4"), self.number("<u8")
        if kind == STRING:
            return [self.string() for _ in self.counted(count, 8)]
        number = np.dtype(_number_type(kind))
        return np.frombuffer(self.take(count * number.itemsize), number).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name, num_dimensions = self.string(), self.number("<u4")
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self.number("<u8") for _ in range(num_dimensions))[::-1]
        return name, shape, self.number("<u4"), self.number("<u8")


def _number_type(kind: int) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"a metadata value has the unknown type {kind}")
    return NUMBERS[kind]
