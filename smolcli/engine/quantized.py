"""Quantized matrices, in the formats of GGUF files that the native kernels read.

GROUP consecutive input features of an output feature share a float16 scale and, in Q4_1, an offset.
A weight is the product of its integer and the scale, plus the offset: exact in float32, except that
Q4_1's sum is rounded once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GROUP = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of a group, by format


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix (out_features, in_features) of integers with scales.

    Args:
        format: "Q4_0", "Q4_1" or "Q8_0".
        blocks: (out_features, in_features / GROUP, bytes of a block) uint8, as in a GGUF file: the
            scale, the offset, and the integers.
    """

    format: str
    blocks: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.blocks.shape[0], self.blocks.shape[1] * GROUP

    @property
    def ndim(self) -> int:
        """2, as of an array."""
        return 2

    @property
    def scales(self) -> Array:
        """(out_features, groups), float16."""
        return _float16(self.blocks[..., 0:2])

    @property
    def offsets(self) -> Array:
        """(out_features, groups), float16; only Q4_1 has them."""
        assert self.format == "Q4_1"
        return _float16(self.blocks[..., 2:4])

    @property
    def codes(self) -> Array:
        """The integers, (out_features, groups, GROUP) uint8; those of Q8_0 plus 128."""
        if self.format == "Q8_0":
            flipped: Array = self.blocks[..., 2:] ^ np.uint8(128)
            return flipped
        nibbles = self.blocks[..., -GROUP // 2 :]
        return np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)

    def dequantized(self) -> Array:
        """The weights, (out_features, in_features) float32."""
        zero = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}[self.format]
        weights = (self.codes.astype(np.float32) - zero) * self.scales.astype(np.float32)[..., None]
        if self.format == "Q4_1":
            weights += self.offsets.astype(np.float32)[..., None]
        return weights.reshape(self.shape)


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


def quantized_as(format: str, weight: Weight) -> QuantizedMatrix:
    """A matrix in a format: itself if it has that format, otherwise rounded.

    Args:
        format: of the result; a matrix in another format can only become "Q8_0".
        weight: (out_features, in_features); in_features is a multiple of GROUP.
    """
    if isinstance(weight, QuantizedMatrix) and weight.format == format:
        return weight
    assert format == "Q8_0"
    groups = as_array(weight).astype(np.float32).reshape(weight.shape[0], -1, GROUP)
    scales = (np.abs(groups).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)
    codes = np.rint(groups / divisors).clip(-127, 127).astype(np.int8)
    return QuantizedMatrix(
        format, np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
    )


def _float16(data: Array) -> Array:
    return np.ascontiguousarray(data).view(np.float16)[..., 0]
