"""A Llama runner whose whole forward pass is one call of kernels.c.

Architecture as in `eager.model`; here no weight is changed: norms and scales are applied as they
come, in float32. Whatever else is in a batch changes no bit of a sequence's hidden states.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smolcli.engine.config import LlamaConfig, rotary_angles
from smolcli.engine.native.bindings import Kernels, LayerStruct, ModelStruct, SpaceStruct, address
from smolcli.engine.native.cache import BufferCache, NativeBatch
from smolcli.engine.native.head import NativeHead


def unsupported_reason(config: LlamaConfig, kernels: Kernels) -> str | None:
    """Why the kernels cannot run a model of this shape, None if they can."""
    multiples = {
        "hidden_size": (config.hidden_size, kernels.panel),
        "intermediate_size": (config.intermediate_size, kernels.width),
        "head_dim": (config.head_dim, 2 * kernels.width),
    }
    for name, (size, divisor) in multiples.items():
        if size % divisor:
            return f"{name} {size} is no multiple of {divisor}"
    if config.head_dim > 256 or config.group_size > kernels.tile_rows:
        return f"{config.group_size} heads of {config.head_dim} to a group are too many"
    return None


class NativeModel:
    """The weights, packed for the kernels, and the forward pass; see `model.Model`.

    Args:
        config: the shapes, which must fit.
        weights: tensors by their names in a Llama checkpoint, without the leading "model.".
        kernels: what computes.
        num_threads: how many threads compute.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, Tensor],
        kernels: Kernels,
        num_threads: int = 1,
    ) -> None:
        self.config = config
        self._kernels = kernels
        self._num_threads = num_threads
        self._kept: list[Any] = []  # what the structure points to
        self._struct = self._model(weights)
        self._space = Space(config, kernels, self._struct.num_threads, 0, 0)
        self.head = NativeHead(kernels, self._struct)

    def make_kv_cache(self, prefix_cache_bytes: int) -> BufferCache:
        """See `model.Model`."""
        return BufferCache(self.config, self._kernels, prefix_cache_bytes)

    def forward(self, batch: NativeBatch) -> Tensor:
        """See `model.Model`; float32."""
        num_rows, spans = len(batch.token_ids), batch.spans
        space = self._make_space(num_rows, int(spans["length"].max()))
        span_of_row = np.repeat(np.arange(len(spans), dtype=np.int32), spans["num_rows"])
        tasks = self._tasks(spans["num_rows"])
        self._kernels.forward(
            ctypes.byref(self._struct),
            address(batch.token_ids),
            address(span_of_row),
            num_rows,
            address(spans),
            address(tasks),
            len(tasks),
            ctypes.byref(space.struct),
        )
        return space.x[batch.last_rows]

    def _tasks(self, num_rows: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """Which rows of which span attend together: (tasks, 3), a span, first and end."""
        size = self._kernels.tile_rows // self.config.group_size
        counts = -(-num_rows // size)
        span = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
        end = np.minimum((number + 1) * size, num_rows[span])
        return np.ascontiguousarray(np.stack([span, number * size, end], axis=1), np.int32)

    def _make_space(self, num_rows: int, length: int) -> "Space":
        """Room for a batch, kept for those to come."""
        space = self._space
        if num_rows > space.num_rows or length > space.length:
            num_rows, length = max(num_rows, space.num_rows), max(length, space.length)
            self._space = Space(
                self.config, self._kernels, self._struct.num_threads, num_rows, length
            )
        return self._space

    def _model(self, weights: Mapping[str, Tensor]) -> ModelStruct:
        config = self.config
        layers = (LayerStruct * config.num_layers)(
            *(self._layer(weights, f"layers.{i}.") for i in range(config.num_layers))
        )
        embed = self._packed(weights["embed_tokens.weight"])
        head = embed if config.is_tied else self._packed(weights["lm_head.weight"])
        angles = torch.from_numpy(rotary_angles(config))
        self._kept.append(layers)
        return ModelStruct(
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            num_threads=self._num_threads,
            eps=config.rms_norm_eps,
            layers=ctypes.cast(layers, ctypes.c_void_p),
            embed=embed,
            head=head,
            norm=self._plain(weights["norm.weight"]),
            cos=self._plain(angles.cos()),
            sin=self._plain(angles.sin()),
        )

    def _layer(self, weights: Mapping[str, Tensor], name: str) -> LayerStruct:
        attention = [weights[f"{name}self_attn.{n}_proj.weight"] for n in "qkv"]
        gate, up = (weights[f"{name}mlp.{n}_proj.weight"] for n in ("gate", "up"))
        return LayerStruct(
            qkv=self._packed(torch.cat(attention)),
            out=self._packed(weights[name + "self_attn.o_proj.weight"]),
            gate_up=self._packed(interleaved(gate, up, self._kernels.width)),
            down=self._packed(weights[name + "mlp.down_proj.weight"]),
            input_norm=self._plain(weights[name + "input_layernorm.weight"]),
            mlp_norm=self._plain(weights[name + "post_attention_layernorm.weight"]),
        )

    def _packed(self, weight: Tensor) -> int:
        self._kept.append(packed := pack(weight.to(self._kernels.dtype), self._kernels))
        return address(packed)

    def _plain(self, values: Tensor) -> int:
        self._kept.append(copy := values.to(torch.float32, copy=True).contiguous())
        return address(copy)


def pack(weight: Tensor, kernels: Kernels) -> Tensor:
    """(out_features, in_features) -> (panels, lanes of in_features, panel, lane), filled with 0."""
    missing = -len(weight) % kernels.panel
    padded = F.pad(weight, (0, 0, 0, missing))
    panels = padded.view(-1, kernels.panel, weight.shape[1] // kernels.lane, kernels.lane)
    return panels.permute(0, 2, 1, 3).contiguous()


def interleaved(gate: Tensor, up: Tensor, width: int) -> Tensor:
    """`width` rows of one, then as many of the other, and so on."""
    shape = (-1, width, gate.shape[1])
    return torch.stack([gate.view(shape), up.view(shape)], dim=1).flatten(0, 2)


class Space:
    """Room for the intermediate values of a batch.

    Args:
        config: the shapes.
        kernels: for which values are laid out.
        num_threads: each of which has scores of its own.
        num_rows: the most tokens of a batch.
        length: of the longest buffer of keys.
    """

    def __init__(
        self, config: LlamaConfig, kernels: Kernels, num_threads: int, num_rows: int, length: int
    ) -> None:
        self.num_rows = num_rows
        self.length = length
        inner = config.num_heads * config.head_dim
        qkv = inner + 2 * config.num_kv_heads * config.head_dim
        qkv += -qkv % kernels.panel
        self.x = torch.empty(num_rows, config.hidden_size)
        floats = [torch.empty(num_rows, qkv), torch.empty(num_threads, kernels.tile_rows, length)]
        widths = (config.hidden_size, inner, inner, config.intermediate_size)
        elements = [torch.empty(num_rows, size, dtype=kernels.dtype) for size in widths]
        self._kept = (floats, elements)
        self.struct = SpaceStruct(
            x=address(self.x),
            qkv=address(floats[0]),
            scores=address(floats[1]),
            scores_stride=kernels.tile_rows * length,
            **dict(zip(("normed", "queries", "mixed", "act"), map(address, elements), strict=True)),
        )
