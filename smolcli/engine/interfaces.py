"""What the engine requires of a model. `native` and `torch_ops` implement it."""

from collections import abc
from typing import Any, Protocol

import numpy as np

from smolcli.engine.config import LlamaConfig
from smolcli.engine.prefix_cache import PrefixCache
from smolcli.engine.sequence import ScheduledSequence, Sequence

Array = np.ndarray[Any, Any]
Masks = abc.Sequence[bytes | None]  # one per row, see Constraint.mask; None allows every token
Batch = Any  # made by a model's own KV cache for its own `forward`
Hidden = Any  # a model's own array of (N, hidden_size); `hidden[[0, 2]]` selects rows


def select_rows(hidden: Hidden, rows: list[int]) -> Hidden:
    """Some rows of hidden states, in ascending order; a view if they are all.

    Args:
        hidden: (N, hidden_size).
        rows: ascending indices.
    """
    return hidden if len(rows) == len(hidden) else hidden[rows]


def unpack_mask(mask: bytes, vocab_size: int) -> Array:
    """A bit mask of allowed tokens as (vocab_size,) booleans."""
    bits = np.frombuffer(mask, np.uint8)
    return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)


class Head(Protocol):
    """The final norm and the projection to the vocabulary."""

    def logits(self, hidden: Hidden) -> Array:
        """Compute logits on the model's device and copy them to the host.

        Args:
            hidden: (N, hidden_size).

        Returns:
            (N, vocab_size), float32, summed in float32 whatever the model's dtype. The caller may
            write to it.
        """
        ...

    def best(self, hidden: Hidden, masks: Masks = ()) -> list[int]:
        """Find each row's most likely allowed token; the lowest id wins a tie.

        Args:
            hidden: (N, hidden_size).
            masks: the allowed tokens of each row; empty allows every token in every row.

        Raises:
            FloatingPointError: a row's logits contain NaN.
        """
        ...


class KVCache(Protocol):
    """The keys and values of every running sequence."""

    @property
    def prefix_cache(self) -> PrefixCache[Any]:
        """Keys and values of earlier prompts."""
        ...

    @property
    def num_sequences(self) -> int:
        """The number of sequences that hold memory."""
        ...

    def bytes_needed(self, sequence: Sequence) -> int:
        """The most bytes that the sequence can occupy, padding included."""
        ...

    def max_length(self, num_bytes: int) -> int:
        """The most tokens of one sequence that `num_bytes` and the model's positions allow."""
        ...

    def allocate(self, sequence: Sequence) -> None:
        """Give a sequence memory and load its cached prefix. Idempotent.

        Sets `num_cached` and `num_reused`.
        """
        ...

    def store_prefix(self, sequence: Sequence) -> None:
        """Copy a computed prompt to the prefix cache, and the answer to it if the cache can."""
        ...

    def ensure_capacity(self, sequence: Sequence) -> None:
        """Make room for every token of the sequence, including the newest."""
        ...

    def batch_key(self, item: ScheduledSequence) -> tuple[int, int]:
        """Sort key that puts the items of a batch in the cheapest order to compute."""
        ...

    def make_batch(self, items: list[ScheduledSequence]) -> Batch:
        """Build the input of `Model.forward` from sorted items that have capacity."""
        ...

    def free(self, sequence: Sequence) -> None:
        """Release the sequence's memory, if it holds any."""
        ...


class Model(Protocol):
    """The weights and the forward pass."""

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        ...

    @property
    def head(self) -> Head:
        """Turns hidden states into logits or tokens."""
        ...

    def make_kv_cache(self, prefix_cache_bytes: int) -> KVCache:
        """Create an empty KV cache.

        Args:
            prefix_cache_bytes: memory for the prefix cache; 0 disables it.
        """
        ...

    def forward(self, batch: Batch) -> Hidden:
        """Compute the hidden states of the last `num_hidden` tokens of each item.

        Returns:
            (N, hidden_size), in the order of the batch's items and their tokens.

        Raises:
            FloatingPointError: a key or value is not finite, and the KV cache holds integers.
        """
        ...
