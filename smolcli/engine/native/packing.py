"""The layout of packed weights: one contiguous buffer that can be stored and memory-mapped.

A matrix (out_features, in_features) becomes panels of `Kernels.panel` output columns; within a
panel, the weights of one input feature (in bfloat16, of two) are contiguous. Rows are permuted so
that the two vectors of a panel contain values that are used together: gate and up, or the two
halves of a head that the rotary embedding combines.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smolcli.engine.config import LlamaConfig, rotary_angles
from smolcli.engine.native.bindings import ALIGNMENT, FLOAT32, Array, Kernels


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The location of a packed tensor in the buffer."""

    offset: int  # bytes, a multiple of ALIGNMENT
    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"

    @property
    def num_bytes(self) -> int:
        """Size in bytes, without trailing padding."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

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


def packed_layout(config: LlamaConfig, kernels: Kernels) -> PackedLayout:
    """The layout of a model's packed weights for a kernel library.

    Args:
        config: the model's shape.
        kernels: the library; its `width` and `weight_dtype` determine the layout.
    """
    tensors, offset = {}, 0
    for name, shape, is_packed in _tensors(config, kernels):
        dtype = kernels.weight_dtype if is_packed else FLOAT32
        tensors[name] = tensor = PackedTensor(offset, shape, dtype)
        offset += tensor.num_bytes + -tensor.num_bytes % ALIGNMENT
    return PackedLayout(tensors, offset)


def pack_into(
    buffer: Array, config: LlamaConfig, weights: Mapping[str, Array], kernels: Kernels
) -> None:
    """Pack a model's weights.

    Args:
        buffer: (num_bytes of the layout,) uint8; overwritten completely.
        config: the model's shape.
        weights: float32, float16 or bfloat16 arrays by their names in a Llama checkpoint, without
            the leading "model.".
        kernels: the library to pack for.

    Raises:
        KeyError: a weight is missing.
    """
    buffer[:] = 0
    layout, width = packed_layout(config, kernels), kernels.width
    for name, tensor in layout.tensors.items():
        _, _, kind = name.rpartition(".")
        source = _SOURCES.get(kind, ())
        parts = [weights[_checkpoint_name(name, part)] for part in source]
        out = tensor.view(buffer)
        if kind in ("cos", "sin"):
            out[:] = rotary_table(config, kind)
        elif len(tensor.shape) == 1:
            out[:] = parts[0]
        elif kind == "qkv":
            _pack([split_heads(part, config.head_dim, width) for part in parts], out)
        elif kind == "gate_up":
            _pack([interleave(parts[0], parts[1], width)], out)
        else:
            _pack(parts, out)


def rotary_table(config: LlamaConfig, kind: str) -> Array:
    """Cosine or sine of the rotary angles, (max_positions, head_dim / 2) float32."""
    angles = rotary_angles(config)
    table: Array = np.cos(angles) if kind == "cos" else np.sin(angles)
    return table


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
}


def _checkpoint_name(name: str, part: str) -> str:
    prefix, dot, _ = name.rpartition(".")
    return f"{prefix}{dot}{part}.weight"


def _tensors(config: LlamaConfig, kernels: Kernels) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it is packed, for all tensors in order of use."""
    hidden, inner = config.hidden_size, config.num_heads * config.head_dim
    num_qkv = inner + 2 * config.num_kv_heads * config.head_dim

    def packed(out_features: int, in_features: int) -> tuple[int, ...]:
        lane = 4 // kernels.weight_dtype.itemsize
        num_panels = -(-out_features // kernels.panel)
        return (num_panels, in_features // lane, kernels.panel, lane)

    yield "embed", packed(config.vocab_size, hidden), True
    for index in range(config.num_layers):
        layer = f"layers.{index}."
        yield f"{layer}input_norm", (hidden,), False
        yield f"{layer}qkv", packed(num_qkv, hidden), True
        yield f"{layer}out", packed(hidden, inner), True
        yield f"{layer}mlp_norm", (hidden,), False
        yield f"{layer}gate_up", packed(2 * config.intermediate_size, hidden), True
        yield f"{layer}down", packed(hidden, config.intermediate_size), True
    yield "norm", (hidden,), False
    if not config.is_tied:
        yield "head", packed(config.vocab_size, hidden), True
    for name in ("cos", "sin"):
        yield name, (config.max_positions, config.head_dim // 2), False


def _pack(parts: list[Array], out: Array) -> None:
    """Rows of all parts -> (panels, in_features / lane, panel, lane); missing rows stay 0."""
    weight = np.concatenate(parts) if len(parts) > 1 else parts[0]
    panel, lane = out.shape[2:]
    num_whole = len(weight) // panel
    panels = weight[: num_whole * panel].reshape(num_whole, panel, -1, lane)
    out[:num_whole] = panels.transpose(0, 2, 1, 3)
    rest = weight[num_whole * panel :]
    if len(rest):
        out[num_whole, :, : len(rest)] = rest.reshape(len(rest), -1, lane).transpose(1, 0, 2)
