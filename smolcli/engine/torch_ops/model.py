"""A Llama runner: one forward pass over tokens of many sequences, flattened, without padding.

Architecture: Touvron et al. 2023 (arXiv:2302.13971); grouped-query attention: Ainslie et al.
2023 (arXiv:2305.13245). The weights of norms and the scale of attention are folded into the
matrices behind them when they are loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smolcli.engine.config import LlamaConfig, rotary_angles
from smolcli.engine.torch_ops.batch import Batch, Span
from smolcli.engine.torch_ops.head import TorchHead
from smolcli.engine.torch_ops.linear import Linear, make_linear
from smolcli.engine.torch_ops.slab_cache import FlatCache


@dataclass(frozen=True, slots=True)
class Layer:
    """The matrices of one layer; `qkv` puts out each group's queries, then its key and value."""

    qkv: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear


class TorchModel:
    """The weights, laid out for this machine, and the forward pass.

    Args:
        config: the shapes.
        weights: tensors by their names in a Llama checkpoint, without the leading "model.".
        dtype: the dtype to compute in.
        device: where to compute.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._embed = _copy(weights["embed_tokens.weight"], dtype, device)
        head = self._embed if config.is_tied else _copy(weights["lm_head.weight"], dtype, device)
        self.head = TorchHead(head, weights["norm.weight"], config.rms_norm_eps)
        self._layers = [self._layer(weights, f"layers.{i}.") for i in range(config.num_layers)]
        self._cos, self._sin = self._rotary_tables()
        self._eps = torch.tensor(config.rms_norm_eps, device=device)

    def make_kv_cache(self, prefix_cache_bytes: int) -> FlatCache:
        """Keys and values for this model's batches."""
        return FlatCache(self.config, self.dtype, self.device, prefix_cache_bytes)

    def forward(self, batch: Batch) -> Tensor:
        """One pass; returns the last hidden states, (N, hidden), of the batch's last rows."""
        x = F.embedding(batch.token_ids, self._embed)  # (T, hidden)
        cos = self._cos[batch.positions]  # (T, 1, 1, head_dim)
        sin = self._sin[batch.positions]
        for index, layer in enumerate(self._layers):
            x = layer.out.plus(self._attention(index, layer, x, cos, sin, batch.spans), x)
            y = self._norm(x)
            x = layer.down.plus(layer.up.times(y, layer.gate.silu(y)), x)
        return x[batch.last_rows]

    def _attention(
        self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, spans: list[Span]
    ) -> Tensor:
        config = self.config
        qkv = layer.qkv(self._norm(x)).view(
            -1, config.num_kv_heads, config.group_size + 2, config.head_dim
        )
        qk = qkv[:, :, :-1]
        qk = torch.addcmul(qk * cos, qk.roll(config.head_dim // 2, -1), sin)
        queries, keys, values = qk[:, :, :-1], qk[:, :, -1], qkv[:, :, -1]
        if len(spans) == 1:
            return spans[0].attend(index, queries, keys, values)
        rows = [span.num_rows for span in spans]
        parts = zip(spans, *(torch.split(t, rows) for t in (queries, keys, values)), strict=True)
        return torch.cat([span.attend(index, q, k, v) for span, q, k, v in parts])

    def _norm(self, x: Tensor) -> Tensor:
        """RMSNorm without its weight; (T, hidden) -> (T, hidden).

        On a CPU torch has no kernel of its own for it: F.rms_norm takes twice as many passes.
        """
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (T, 1)
        mean_square = torch.addcmul(self._eps, length, length, value=1 / x.shape[-1])
        return x * mean_square.rsqrt_().to(x.dtype)

    def _linear(self, weight: Tensor, norm: Tensor | None = None) -> Linear:
        if norm is not None:
            weight = weight.float() * norm.float()
        return make_linear(weight.to(self.device, self.dtype))

    def _layer(self, weights: Mapping[str, Tensor], name: str) -> Layer:
        norm = weights[name + "post_attention_layernorm.weight"]
        return Layer(
            qkv=self._linear(
                self._grouped_qkv(weights, name + "self_attn."),
                weights[name + "input_layernorm.weight"],
            ),
            out=self._linear(weights[name + "self_attn.o_proj.weight"]),
            gate=self._linear(weights[name + "mlp.gate_proj.weight"], norm),
            up=self._linear(weights[name + "mlp.up_proj.weight"], norm),
            down=self._linear(weights[name + "mlp.down_proj.weight"]),
        )

    def _grouped_qkv(self, weights: Mapping[str, Tensor], name: str) -> Tensor:
        """One matrix, group by group, so that a view of its output folds groups into rows."""
        config = self.config
        scale = config.head_dim**-0.5

        def grouped(matrix: str, heads: int) -> Tensor:
            weight = weights[f"{name}{matrix}.weight"].float()
            return weight.view(config.num_kv_heads, heads, config.head_dim, config.hidden_size)

        q = grouped("q_proj", config.group_size) * scale
        qkv = torch.cat([q, grouped("k_proj", 1), grouped("v_proj", 1)], dim=1)
        return qkv.view(-1, config.hidden_size)

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each (max_positions, 1, 1, head_dim)."""
        angles = rotary_angles(self.config)
        cos, sin = angles.cos(), angles.sin()
        tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        first, second = (t[:, None, None].to(self.device, self.dtype) for t in tables)
        return first, second


def _copy(weight: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight of our own, so that the file it is mapped from can be let go."""
    return weight.to(device, dtype, copy=True)
