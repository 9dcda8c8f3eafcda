"""The shape of a Llama model."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What decides the shapes and the arithmetic of a Llama model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    is_tied: bool
    eos_ids: frozenset[int]

    @property
    def group_size(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_weights(self) -> int:
        """Weights in all matrices; the norms' hardly count."""
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        return self.num_layers * layer + embeddings

    def kv_cache_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Bytes of keys and values for `num_tokens` positions in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize * num_tokens


def rotary_angles(config: LlamaConfig) -> Tensor:
    """By how much each pair of a head is turned at each position; (max_positions, head_dim / 2)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    return torch.outer(positions, config.rope_theta**-exponents)
