"""The input of one forward pass over tokens of many sequences, flattened, without padding."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Span(Protocol):
    """Neighbouring rows of a batch whose attention is computed together."""

    num_rows: int

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the rows' keys and values, (R, kv_heads, head_dim), and attend to all before them.

        Args:
            layer: which layer's cache.
            queries: (R, kv_heads, group_size, head_dim), already scaled.

        Returns:
            (R, num_heads * head_dim).
        """
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step.

    `token_ids` and `positions` are (T,); `spans` cover the T rows in order; `last_rows`, (N,),
    are the rows whose next token is wanted.
    """

    token_ids: Tensor
    positions: Tensor
    spans: list[Span]
    last_rows: Tensor
