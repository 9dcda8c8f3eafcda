"""What the engine needs of a model: the two in `eager` and `native` have it."""

from collections import abc
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from smolcli.engine.config import LlamaConfig
from smolcli.engine.prefix_cache import PrefixCache
from smolcli.engine.sequence import ScheduledSequence, Sequence

Masks = abc.Sequence[bytes | None]  # one for each row; None allows all


def forbid(logits: Tensor, masks: Masks) -> None:
    """Set to minus infinity, in place, what the masks do not allow of (N, vocab_size)."""
    for row, mask in zip(logits, masks, strict=True):
        if mask is not None:
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(row), bitorder="little")
            allowed = torch.from_numpy(bits.view(np.bool_)).to(row.device)
            row.masked_fill_(~allowed, -torch.inf)


Batch = Any  # what a model's own cache makes and its `forward` takes


class Head(Protocol):
    """From hidden states, (N, hidden), to the next tokens."""

    def logits(self, x: Any) -> Tensor:
        """(N, hidden) -> (N, vocab_size), float32, for the caller to change."""
        ...

    def refine(self, x: Any, logits: Tensor, width: int) -> None:
        """See to it that the `width` largest logits of each row are as exact as float32."""
        ...

    def best(self, x: Any, masks: Masks = ()) -> list[int]:
        """The most likely token for each row that its mask, if any, allows; of equals, the first.

        Raises:
            FloatingPointError: a row has no largest logit, because it holds NaN.
        """
        ...


class KVCache(Protocol):
    """Owner of all keys and values."""

    @property
    def prefix_cache(self) -> PrefixCache:
        """Beginnings of prompts, kept for prompts to come."""
        ...

    @property
    def num_sequences(self) -> int:
        """How many sequences hold something."""
        ...

    def bytes_needed(self, sequence: Sequence) -> int:
        """The most bytes that the sequence will hold, padding included."""
        ...

    def max_length(self, num_bytes: int) -> int:
        """The most tokens of one sequence: what the model was made for, and what so much holds."""
        ...

    def allocate(self, sequence: Sequence) -> None:
        """Give a new sequence a place, filled as far as its beginning is known."""
        ...

    def store_prefix(self, sequence: Sequence) -> None:
        """Keep a prompt that is computed, for those that begin like it."""
        ...

    def ensure_capacity(self, sequence: Sequence) -> None:
        """See that all tokens of the sequence, the newest included, have a place."""
        ...

    def batch_key(self, work: ScheduledSequence) -> tuple[int, int]:
        """Works sorted by this make the cheapest batch."""
        ...

    def make_batch(self, works: list[ScheduledSequence]) -> Batch:
        """The input of a forward pass over sorted works that have room."""
        ...

    def free(self, sequence: Sequence) -> None:
        """Drop what the sequence holds, if anything."""
        ...


class Model(Protocol):
    """The weights, and how to compute with them."""

    @property
    def config(self) -> LlamaConfig:
        """The shapes."""
        ...

    @property
    def head(self) -> Head:
        """What chooses the next tokens."""
        ...

    def make_kv_cache(self, prefix_cache_bytes: int) -> KVCache:
        """Keys and values for this model's batches; so much memory for beginnings of prompts."""
        ...

    def forward(self, batch: Batch) -> Any:
        """Hidden states, (N, hidden), of the works that complete, in their order."""
        ...
