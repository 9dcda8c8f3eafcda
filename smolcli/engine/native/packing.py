"""The layout of packed weights: one contiguous buffer that can be stored and memory-mapped.

A matrix (out_features, in_features) becomes panels of `Kernels.panel` output columns; within a
panel, the weights of one input feature (in bfloat16, of two) are contiguous. Rows are permuted so
that the two vectors of a panel contain values that are used together: gate and up, or the two
halves of a head that the rotary embedding combines.

Quantized matrices stay quantized; integer products need all matrices to be. Within a panel, each
block of input features has the scales of all columns, their offsets, and their integers in words of
32 bits; see kernels.c. Matrices that are packed together but stored in different formats get one
that holds them all; if there is none, they are expanded, or for integer products rounded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from smolcli.engine.config import LlamaConfig, rotary_angles
from smolcli.engine.native.bindings import ALIGNMENT, FLOAT32, Array, Kernels
from smolcli.engine.quantized import (
    BLOCK_FORMATS,
    Formats,
    QuantizedMatrix,
    Weights,
    as_array,
    common_format,
    formats_of,
    quantized_as,
)

DENSE = "dense"
MATRICES = ("embed", "head", "qkv", "out", "gate_up", "down")
LENGTHS = {"embed": "embed_lengths", "head": "head_lengths"}  # see `row_lengths`
INTEGER_FORMATS = ("Q4_0", "Q4_1", "Q8_0")  # of matrices that are multiplied in integers
REQUANTIZED = "Q8_0"  # what integer products make of other matrices
ROUNDING_MARGIN = 1.02  # inputs and weights are rounded before they are multiplied
PANELS_AT_ONCE = 64  # whose lengths are computed, to save memory
LENGTH_MARGIN = 1.0001  # lengths are rounded, too
SMALLEST_LIMIT = 1e-30  # of keys and values that are always 0
NOT_QUANTIZED: Formats = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The location of a packed tensor in the buffer."""

    offset: int  # bytes, a multiple of ALIGNMENT
    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    format: str = DENSE  # of `bindings.FORMATS`

    @property
    def num_bytes(self) -> int:
        """Size in bytes, without trailing padding."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Array) -> Array:
        """The tensor in a buffer of bytes."""
        return (
            buffer[self.offset : self.offset + self.num_bytes].view(self.dtype).reshape(self.shape)
        )


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """All packed tensors of a model by name, in the order of the buffer."""

    tensors: dict[str, PackedTensor]
    num_bytes: int


def packed_layout(
    config: LlamaConfig, kernels: Kernels, formats: Formats = NOT_QUANTIZED
) -> PackedLayout:
    """The layout of a model's packed weights for a kernel library.

    Args:
        config: the model's shape.
        kernels: the library; its `width` and `weight_dtype` determine the layout.
        formats: the formats of the checkpoint's tensors; those without one are not quantized.
    """
    tensors, offset = {}, 0
    for name, shape in _tensors(config, kernels, formats):
        tensors[name] = tensor = _packed_tensor(name, shape, offset, kernels, formats)
        offset += tensor.num_bytes + -tensor.num_bytes % ALIGNMENT
    return PackedLayout(tensors, offset)


def _packed_tensor(
    name: str, shape: tuple[int, ...], offset: int, kernels: Kernels, formats: Formats
) -> PackedTensor:
    if name.rpartition(".")[2] not in MATRICES:
        return PackedTensor(offset, shape, FLOAT32)
    out_features, in_features = shape
    num_panels = -(-out_features // kernels.panel)
    stored = _stored_format(name, kernels, formats)
    if stored is None:
        lane = 4 // kernels.weight_dtype.itemsize
        dense = (num_panels, in_features // lane, kernels.panel, lane)
        return PackedTensor(offset, dense, kernels.weight_dtype)
    block = BLOCK_FORMATS[stored]
    blocks = (num_panels, in_features // block.size, block.num_bytes * kernels.panel)
    return PackedTensor(offset, blocks, np.dtype(np.uint8), stored)


def _stored_format(name: str, kernels: Kernels, formats: Formats) -> str | None:
    """The quantized format of a packed matrix, None if it is not quantized."""
    stored = common_format(formats.get(part, DENSE) for part in _sources(name))
    if kernels.integers and stored not in INTEGER_FORMATS:
        return REQUANTIZED
    return stored


def pack_into(buffer: Array, config: LlamaConfig, weights: Weights, kernels: Kernels) -> None:
    """Pack a model's weights.

    Args:
        buffer: (num_bytes of the layout,) uint8; overwritten completely.
        config: the model's shape.
        weights: float32, float16 or bfloat16 arrays and quantized matrices.
        kernels: the library to pack for.

    Raises:
        KeyError: a weight is missing.
    """
    buffer[:] = 0  # padding
    for name, tensor in packed_layout(config, kernels, formats_of(weights)).tensors.items():
        out, kind = tensor.view(buffer), name.rpartition(".")[2]
        parts = [weights[part] for part in _sources(name)]
        if not parts:
            out[:] = rotary_table(config, kind)
        elif kind in LENGTHS.values():
            assert isinstance(parts[0], QuantizedMatrix)
            out[:] = row_lengths(parts[0], kernels.panel)
        elif kind == "kv_limits":
            keys, values, norm = map(as_array, parts)
            out[:] = kv_limits(keys, values, norm, config)
        elif len(tensor.shape) == 1:
            out[:] = as_array(parts[0])
        elif tensor.format == DENSE:
            _pack(_arranged(kind, [as_array(part) for part in parts], config, kernels.width), out)
        else:
            blocks = [quantized_as(tensor.format, part).blocks for part in parts]
            flat = [part.reshape(len(part), -1) for part in blocks]
            rows = _arranged(kind, flat, config, kernels.width)
            matrix = QuantizedMatrix(tensor.format, rows.reshape(len(rows), *blocks[0].shape[1:]))
            _pack_quantized(matrix, out, kernels.panel)


def _arranged(kind: str, parts: list[Array], config: LlamaConfig, width: int) -> Array:
    """The rows of all parts in the order of the packed matrix."""
    if kind == "qkv":
        return np.concatenate([split_heads(part, config.head_dim, width) for part in parts])
    return interleave(parts[0], parts[1], width) if kind == "gate_up" else parts[0]


def rotary_table(config: LlamaConfig, kind: str) -> Array:
    """Cosine or sine of the rotary angles, (max_positions, head_dim / 2) float32."""
    angles = rotary_angles(config)
    table: Array = np.cos(angles) if kind == "cos" else np.sin(angles)
    return table


def kv_limits(keys: Array, values: Array, norm: Array, config: LlamaConfig) -> Array:
    """What the keys and values of a layer cannot exceed, whatever its input is.

    The root mean square of normed inputs is 1, so their product with the weights of a channel is
    at most that of the lengths of both. The rotary embedding rotates pairs of channels.

    Args:
        keys: weights of the key projection, (kv_heads * D, H).
        values: weights of the value projection, (kv_heads * D, H).
        norm: weights of the norm in front of them, (H,).
        config: the model's shape.

    Returns:
        (2, kv_heads, D) float32, keys first.
    """
    length = np.float32(math.sqrt(config.hidden_size) * ROUNDING_MARGIN)
    lengths = [np.linalg.norm(weight * norm, axis=1) for weight in (keys, values)]
    shape = (2, config.num_kv_heads, config.head_dim)
    limits: Array = length * np.array(lengths, np.float32).reshape(shape)
    pairs = limits[0].reshape(-1, 2, config.head_dim // 2)
    pairs[:] = np.hypot(pairs[:, :1], pairs[:, 1:])
    return np.maximum(limits, SMALLEST_LIMIT)


def row_lengths(head: QuantizedMatrix, panel: int) -> Array:
    """What bounds the errors of logits: the length of the longest row of weights in each panel.

    Args:
        head: (vocab, H).
        panel: output features per panel.

    Returns:
        (2, panels) float32: the length of the weights, and that of their terms' magnitudes, whose
        sums are rounded. NaN where a weight is.
    """
    step = PANELS_AT_ONCE * panel
    parts = [head.blocks[first : first + step] for first in range(0, len(head.blocks), step)]
    longest = [_longest_rows(QuantizedMatrix(head.format, part), panel) for part in parts]
    return np.concatenate(longest, axis=1)


def _longest_rows(rows: QuantizedMatrix, panel: int) -> Array:
    """The same for some rows."""
    layout, num_rows = rows.layout, rows.shape[0]
    codes = rows.codes.astype(np.int32)  # sums are exact
    sums, squares = codes.sum(axis=2), np.einsum("rbi,rbi->rb", codes, codes)
    scales = rows.scales.astype(np.float64)
    offsets = rows.offsets.astype(np.float64) if layout.has_offsets else scales * -layout.zero
    mixed = 2 * sums * scales * offsets
    apart = squares * scales**2 + layout.size * offsets**2
    lengths = np.stack([apart + mixed, apart + np.abs(mixed)]).sum(axis=2)
    padded = np.zeros((2, -(-num_rows // panel) * panel))
    padded[:, :num_rows] = np.sqrt(np.maximum(lengths, 0)) * LENGTH_MARGIN
    longest: Array = padded.reshape(2, -1, panel).max(axis=2).astype(np.float32)
    return longest


def interleave(first: Array, second: Array, width: int) -> Array:
    """Alternate `width` rows of one matrix with `width` rows of the other."""
    shape = (-1, width, first.shape[1])
    pairs = np.stack([first.reshape(shape), second.reshape(shape)], axis=1)
    return pairs.reshape(-1, first.shape[1])


def split_heads(weight: Array, head_dim: int, width: int) -> Array:
    """Alternate `width` rows of the first half of each head with `width` rows of its second."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return interleave(
        halves[:, 0].reshape(-1, weight.shape[1]), halves[:, 1].reshape(-1, weight.shape[1]), width
    )


# The checkpoint tensors that each packed tensor is built from.
_SOURCES = {
    "embed": ("embed_tokens",),
    "head": ("lm_head",),
    "norm": ("norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "input_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
    "embed_lengths": ("embed_tokens",),
    "head_lengths": ("lm_head",),
    "kv_limits": ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm"),
}


def _sources(name: str) -> list[str]:
    """The names of the checkpoint tensors that a packed tensor is built from."""
    prefix, dot, kind = name.rpartition(".")
    return [f"{prefix}{dot}{part}.weight" for part in _SOURCES.get(kind, ())]


def _tensors(
    config: LlamaConfig, kernels: Kernels, formats: Formats
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of all tensors in order of use; matrices are (out, in)."""
    hidden, inner = config.hidden_size, config.num_heads * config.head_dim
    yield "embed", (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"layers.{index}."
        yield f"{layer}input_norm", (hidden,)
        if kernels.has_integer_attention:
            yield f"{layer}kv_limits", (2, config.num_kv_heads, config.head_dim)
        yield f"{layer}qkv", (inner + 2 * config.num_kv_heads * config.head_dim, hidden)
        yield f"{layer}out", (hidden, inner)
        yield f"{layer}mlp_norm", (hidden,)
        yield f"{layer}gate_up", (2 * config.intermediate_size, hidden)
        yield f"{layer}down", (hidden, config.intermediate_size)
    yield "norm", (hidden,)
    if not config.is_tied:
        yield "head", (config.vocab_size, hidden)
    head = "embed" if config.is_tied else "head"
    if _can_bound_logits(_stored_format(head, kernels, formats), kernels):
        yield LENGTHS[head], (2, -(-config.vocab_size // kernels.panel))
    for name in ("cos", "sin"):
        yield name, (config.max_positions, config.head_dim // 2)


def _can_bound_logits(format: str | None, kernels: Kernels) -> bool:
    """Whether products of integers can bound those that the kernels compute with the LM head."""
    has_exact_weights = kernels.weight_dtype == FLOAT32  # bfloat16 rounds the weights it expands
    return has_exact_weights and not kernels.integers and format in INTEGER_FORMATS


def _pack(weight: Array, out: Array) -> None:
    """Rows -> (panels, in_features / lane, panel, lane); missing rows stay 0."""
    panel, lane = out.shape[2:]
    num_whole = len(weight) // panel
    panels = weight[: num_whole * panel].reshape(num_whole, panel, -1, lane)
    out[:num_whole] = panels.transpose(0, 2, 1, 3)
    rest = weight[num_whole * panel :]
    if len(rest):
        out[num_whole, :, : len(rest)] = rest.reshape(len(rest), -1, lane).transpose(1, 0, 2)


def _pack_quantized(matrix: QuantizedMatrix, out: Array, panel: int) -> None:
    """Rows -> (panels, blocks, scales, offsets and words of all columns); missing rows stay 0."""
    codes, layout = matrix.codes, matrix.layout
    if layout.bits == 4:  # two features per byte
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    words = np.ascontiguousarray(codes).view(np.uint32)  # (rows, blocks, words)
    scale_bytes = layout.scale_bytes * panel
    numbers = out[..., :scale_bytes].view(layout.number).reshape(*out.shape[:2], -1, panel)
    integers = out[..., scale_bytes:].view(np.uint32).reshape(*out.shape[:2], -1, panel)
    _fill_panels(matrix.scales[..., None], numbers[..., :1, :])
    if layout.has_offsets:
        _fill_panels(matrix.offsets[..., None], numbers[..., 1:, :])
    _fill_panels(words, integers)


def _fill_panels(rows: Array, out: Array) -> None:
    """(rows, blocks, values) -> (panels, blocks, values, panel)."""
    panel = out.shape[-1]
    num_whole = len(rows) // panel
    whole = rows[: num_whole * panel].reshape(num_whole, panel, *rows.shape[1:])
    out[:num_whole] = whole.transpose(0, 2, 3, 1)
    rest = rows[num_whole * panel :]
    if len(rest):
        out[num_whole, ..., : len(rest)] = rest.transpose(1, 2, 0)
