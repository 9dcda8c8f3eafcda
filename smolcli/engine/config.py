"""The shape of a Llama model."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from smolcli.errors import ModelError

MAX_SIZES = {  # far above any real model; a damaged config.json must not exhaust memory
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_layers": 1 << 12,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_positions": 1 << 22,
}
CONFIG_NAMES = {  # names of fields that config.json spells differently
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "is_tied": "tie_word_embeddings",
    "eos_ids": "eos_token_id",
}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The sizes and constants that define a Llama model's computation.

    Args:
        vocab_size: number of rows of the embedding.
        hidden_size: size of the residual stream.
        intermediate_size: size of the MLP's hidden layer.
        num_layers: number of transformer blocks.
        num_heads: query heads per layer.
        num_kv_heads: key/value heads per layer, which divide the query heads into groups.
        head_dim: size of a head; even.
        max_positions: context length in tokens.
        rms_norm_eps: added to the mean square in each norm.
        rope_theta: base of the rotary embedding's frequencies.
        is_tied: whether the output projection is the embedding.
        eos_ids: tokens that end an answer.

    Raises:
        ModelError: a value has the wrong type, is out of range or contradicts another one.
    """

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

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, getattr(self, field.name))
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")

    def _check(self, name: str, value: Any) -> None:
        if name in MAX_SIZES:
            is_valid = type(value) is int and 1 <= value <= MAX_SIZES[name]
            expected = f"an integer from 1 to {MAX_SIZES[name]}"
        elif name == "is_tied":
            is_valid, expected = type(value) is bool, "true or false"
        elif name == "eos_ids":
            is_valid = all(type(i) is int and 0 <= i < self.vocab_size for i in value)
            value = sorted(value, key=str)
            expected = f"token ids from 0 to {self.vocab_size - 1}"
        else:
            is_number = type(value) in (int, float)
            is_valid, expected = is_number and math.isfinite(value) and value > 0, "positive"
        if not is_valid:
            raise ModelError(f"{CONFIG_NAMES.get(name, name)} must be {expected}, not {value!r}")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_weights(self) -> int:
        """The number of weights in all matrices; norm weights are negligible and not counted."""
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        return self.num_layers * layer + embeddings

    def kv_cache_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Bytes of the keys and values of `num_tokens` positions in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize * num_tokens


def rotary_angles(config: LlamaConfig) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The rotation of each pair of a head's dimensions at each position, in radians.

    Returns:
        (max_positions, head_dim / 2), float32.
    """
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = (float(config.rope_theta) ** -exponents).astype(np.float32)
    return np.outer(np.arange(config.max_positions, dtype=np.float32), frequencies)
