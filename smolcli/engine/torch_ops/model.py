"""A Llama forward pass over tokens of many sequences, flattened, without padding.

Architecture: Touvron et al. 2023 (arXiv:2302.13971); grouped-query attention: Ainslie et al. 2023
(arXiv:2305.13245). Norm weights and the attention scale are folded into the matrices that follow
them when the model is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smolcli.engine.config import LlamaConfig, rotary_angles
from smolcli.engine.interfaces import Array, Masks, unpack_mask
from smolcli.engine.torch_ops.attention import Batch, Span
from smolcli.engine.torch_ops.slab_cache import BatchedSlabCache


@dataclass(frozen=True, slots=True)
class Layer:
    """The matrices of one layer, (out_features, in_features) each.

    The rows of `qkv` are grouped: for each key/value head its queries, then its key and its value.
    """

    qkv: Tensor
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class TorchHead:
    """See `interfaces.Head`. Computes in float32 in every dtype, so that no logit is rounded.

    Args:
        weight: (vocab_size, hidden_size).
        norm: (hidden_size,), weight of the final norm.
        eps: added to the mean square in the norm.
    """

    def __init__(self, weight: Tensor, norm: Tensor, eps: float) -> None:
        self._weight = weight.float()
        self._norm = norm.to(weight.device, torch.float32)
        self._eps = eps

    def logits(self, hidden: Tensor) -> Array:
        """See `interfaces.Head`."""
        logits: Array = self._logits(hidden).cpu().numpy()
        return logits

    def best(self, hidden: Tensor, masks: Masks = ()) -> list[int]:
        """See `interfaces.Head`. Only the token ids are copied to the host."""
        logits = self._logits(hidden)
        for row, mask in zip(logits, masks, strict=False):
            if mask is not None:
                is_allowed = torch.from_numpy(unpack_mask(mask, len(row))).to(row.device)
                row.masked_fill_(~is_allowed, -torch.inf)
        if logits.amax(-1).isnan().any():
            raise FloatingPointError("the model computed logits that are not numbers")
        token_ids: list[int] = logits.argmax(-1).tolist()
        return token_ids

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], self._norm, self._eps)
        return F.linear(normed, self._weight)


class TorchModel:
    """The weights on one device and the forward pass; see `interfaces.Model`.

    Args:
        config: the model's shape.
        weights: arrays or tensors by their names in a Llama checkpoint, without the leading
            "model.".
        dtype: the dtype to compute in.
        device: the device to compute on.

    Raises:
        KeyError: a weight is missing.
        RuntimeError: a weight has the wrong shape, or the device has too little memory.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._embed = self._copy(weights["embed_tokens.weight"])
        head = self._embed if config.is_tied else self._copy(weights["lm_head.weight"])
        self.head = TorchHead(head, as_tensor(weights["norm.weight"]), config.rms_norm_eps)
        self._layers = [self._layer(weights, f"layers.{i}.") for i in range(config.num_layers)]
        self._cos, self._sin = self._rotary_tables()
        self._eps = torch.tensor(config.rms_norm_eps, device=device)

    def make_kv_cache(self, prefix_cache_bytes: int) -> BatchedSlabCache:
        """See `interfaces.Model`."""
        return BatchedSlabCache(self.config, self.dtype, self.device, prefix_cache_bytes)

    def forward(self, batch: Batch) -> Tensor:
        """See `interfaces.Model`; (N, hidden_size)."""
        x = F.embedding(batch.token_ids, self._embed)  # (T, hidden_size)
        cos = self._cos[batch.positions]  # (T, 1, 1, head_dim)
        sin = self._sin[batch.positions]
        for index, layer in enumerate(self._layers):
            x = x + F.linear(self._attention(index, layer, x, cos, sin, batch.spans), layer.out)
            y = self._norm(x)
            x = x + F.linear(F.silu(F.linear(y, layer.gate)) * F.linear(y, layer.up), layer.down)
        return x[batch.hidden_rows]

    def _attention(
        self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, spans: list[Span]
    ) -> Tensor:
        """(T, hidden_size) -> (T, num_heads * head_dim)."""
        config = self.config
        qkv = F.linear(self._norm(x), layer.qkv).view(
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
        """RMSNorm without its weight; (T, hidden_size) -> (T, hidden_size)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (T, 1)
        mean_square = torch.addcmul(self._eps, length, length, value=1 / x.shape[-1])
        return x * mean_square.rsqrt_().to(x.dtype)

    def _layer(self, weights: Mapping[str, Any], name: str) -> Layer:
        norm = weights[name + "post_attention_layernorm.weight"]
        qkv = self._grouped_qkv(weights, name + "self_attn.")
        return Layer(
            qkv=self._folded(qkv, weights[name + "input_layernorm.weight"]),
            out=self._copy(weights[name + "self_attn.o_proj.weight"]),
            gate=self._folded(weights[name + "mlp.gate_proj.weight"], norm),
            up=self._folded(weights[name + "mlp.up_proj.weight"], norm),
            down=self._copy(weights[name + "mlp.down_proj.weight"]),
        )

    def _folded(self, weight: Any, norm: Any) -> Tensor:
        """A matrix that includes the weight of the norm before it."""
        product = as_tensor(weight).float() * as_tensor(norm).float()
        return product.to(self.device, self.dtype).contiguous()

    def _copy(self, weight: Any) -> Tensor:
        """A copy, so that the file that the weight is mapped from can be closed."""
        return as_tensor(weight).to(self.device, self.dtype, copy=True).contiguous()

    def _grouped_qkv(self, weights: Mapping[str, Any], name: str) -> Tensor:
        """One matrix, head group by head group, so that a view of its output splits the groups."""
        config = self.config
        scale = config.head_dim**-0.5

        def grouped(matrix: str, heads: int) -> Tensor:
            weight = as_tensor(weights[f"{name}{matrix}.weight"]).float()
            return weight.view(config.num_kv_heads, heads, config.head_dim, config.hidden_size)

        q = grouped("q_proj", config.group_size) * scale
        qkv = torch.cat([q, grouped("k_proj", 1), grouped("v_proj", 1)], dim=1)
        return qkv.view(-1, config.hidden_size)

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each (max_positions, 1, 1, head_dim)."""
        angles = torch.from_numpy(rotary_angles(self.config))
        cos, sin = angles.cos(), angles.sin()
        tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        first, second = (t[:, None, None].to(self.device, self.dtype) for t in tables)
        return first, second


def as_tensor(weight: Any) -> Tensor:
    """A weight as a tensor; torch does not know NumPy's bfloat16."""
    if isinstance(weight, Tensor):
        return weight
    if not weight.flags.writeable:  # torch warns of read-only memory
        weight = weight.copy()
    if weight.dtype.name == "bfloat16":
        return torch.from_numpy(weight.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(weight)
