"""Quantized matrices, in the formats that the native kernels read.

A block of consecutive input features of an output feature shares a scale and, in some formats, an
offset. A weight is the product of its integer and the scale, plus the offset: exact in float32,
except that the sum is rounded once.

Q4_0, Q4_1 and Q8_0 are those of GGUF files. The others hold GGUF's K-quants without loss: their
scales of two levels are multiplied, and integers of 5 or 6 bits take 8.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GROUP = 32  # input features that share the scale of a product of integers

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What a block consists of: its scale, its offset, and its integers.

    Args:
        bits: bits per integer, 4 or 8.
        zero: zero point, which is subtracted from the integers.
        has_offsets: whether there is an offset.
        number: the dtype of the scale and the offset.
        size: input features per block.
    """

    bits: int
    zero: int
    has_offsets: bool = False
    number: "np.dtype[Any]" = FLOAT16
    size: int = 32

    @property
    def scale_bytes(self) -> int:
        """Bytes of a block's scale and offset."""
        return self.number.itemsize * (2 if self.has_offsets else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of a block."""
        return self.scale_bytes + self.size * self.bits // 8


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(bits=4, zero=8),
    "Q4_1": BlockFormat(bits=4, zero=0, has_offsets=True),
    "Q8_0": BlockFormat(bits=8, zero=128),
    "Q4_K": BlockFormat(bits=4, zero=0, has_offsets=True, number=FLOAT32),
    "Q5_K": BlockFormat(bits=8, zero=0, has_offsets=True, number=FLOAT32),
    "Q6_K": BlockFormat(bits=8, zero=128, number=FLOAT32, size=16),
}
COMMON = "Q5_K"  # holds matrices in any format with blocks of the same size


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix (out_features, in_features) of integers with scales.

    Args:
        format: a key of `BLOCK_FORMATS`.
        blocks: (out_features, blocks, bytes of a block) uint8. Integers of 4 bits are in GGUF's
            order, the first half of a block in the lower bits; those of 8 bits are signed if the
            format has no offsets.
    """

    format: str
    blocks: Array

    @classmethod
    def of(
        cls, format: str, scales: Array, codes: Array, offsets: Array | None = None
    ) -> "QuantizedMatrix":
        """Build the blocks of a matrix from what the properties of the same names return."""
        layout = BLOCK_FORMATS[format]
        numbers = [scales] if offsets is None else [scales, offsets]
        parts = [part.astype(layout.number)[..., None].view(np.uint8) for part in numbers]
        if layout.bits == 4:
            half = layout.size // 2
            codes = codes[..., :half] | codes[..., half:] << 4
        else:
            codes = codes ^ np.uint8(layout.zero)
        return cls(format, np.concatenate([*parts, codes], axis=-1))

    @property
    def layout(self) -> BlockFormat:
        """What the blocks consist of."""
        return BLOCK_FORMATS[self.format]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.blocks.shape[0], self.blocks.shape[1] * self.layout.size

    @property
    def ndim(self) -> int:
        """2, as of an array."""
        return 2

    @property
    def scales(self) -> Array:
        """(out_features, blocks), float16 or float32."""
        return self._number(0)

    @property
    def offsets(self) -> Array:
        """(out_features, blocks), float16 or float32; only some formats have them."""
        assert self.layout.has_offsets
        return self._number(1)

    @property
    def codes(self) -> Array:
        """The integers, (out_features, blocks, size) uint8, before `zero` is subtracted."""
        layout = self.layout
        stored = self.blocks[..., layout.scale_bytes :]
        if layout.bits == 4:
            return np.concatenate([stored & 15, stored >> 4], axis=-1)
        flipped: Array = stored ^ np.uint8(layout.zero)
        return flipped

    def dequantized(self) -> Array:
        """The weights, (out_features, in_features) float32."""
        weights = self.codes.astype(np.float32) - self.layout.zero
        weights *= self.scales.astype(np.float32)[..., None]
        if self.layout.has_offsets:
            weights += self.offsets.astype(np.float32)[..., None]
        return weights.reshape(self.shape)

    def _number(self, index: int) -> Array:
        size = self.layout.number.itemsize
        data = np.ascontiguousarray(self.blocks[..., index * size : (index + 1) * size])
        return data.view(self.layout.number)[..., 0]


Weight = Array | QuantizedMatrix
Weights = Mapping[str, Weight]  # by their names in a Llama checkpoint, without "model."
Formats = Mapping[str, str]  # names of tensors, and the dtype or format of each


def formats_of(weights: Weights) -> dict[str, str]:
    """The dtype or quantized format of each tensor."""
    return {
        name: weight.format if isinstance(weight, QuantizedMatrix) else weight.dtype.name
        for name, weight in weights.items()
    }


def as_array(weight: Weight) -> Array:
    """The weights as an array; float32 if they are quantized."""
    return weight.dequantized() if isinstance(weight, QuantizedMatrix) else weight


def common_format(formats: Iterable[str]) -> str | None:
    """A format that holds matrices in all of these without loss; None if there is none."""
    found = set(formats)
    if not found <= BLOCK_FORMATS.keys():
        return None
    if len(found) == 1:
        return found.pop()
    sizes = {BLOCK_FORMATS[format].size for format in found}
    return COMMON if sizes == {BLOCK_FORMATS[COMMON].size} else None


def quantized_as(format: str, weight: Weight) -> QuantizedMatrix:
    """A matrix in a format: itself if it has that format, without loss if that is possible.

    Args:
        format: the result's format: "Q8_0", or one that `common_format` returns.
        weight: (out_features, in_features); in_features is a multiple of GROUP.
    """
    if isinstance(weight, QuantizedMatrix) and weight.format == format:
        return weight
    if isinstance(weight, QuantizedMatrix) and format == COMMON:
        scales = weight.scales.astype(np.float32)
        offsets = weight.offsets if weight.layout.has_offsets else scales * -weight.layout.zero
        return QuantizedMatrix.of(format, scales, weight.codes, offsets)
    assert format == "Q8_0"
    groups = as_array(weight).astype(np.float32).reshape(weight.shape[0], -1, GROUP)
    scales = (np.abs(groups).max(axis=-1) / 127).astype(np.float16)
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    codes = np.rint(groups / divisors).clip(-127, 127) + 128
    return QuantizedMatrix.of(format, scales, codes.astype(np.uint8))
