"""The input of a forward pass, and attention over the KV cache for each span of its rows."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_MAX_ROWS = 4  # up to here one fused attention call is faster than batched products


class Span(Protocol):
    """Consecutive rows of a batch whose attention is computed together."""

    num_rows: int

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the rows' keys and values, then attend to all positions up to each row's own.

        Args:
            layer: index of the layer.
            queries: (R, kv_heads, group_size, head_dim), already scaled.
            keys: (R, kv_heads, head_dim).
            values: (R, kv_heads, head_dim).

        Returns:
            (R, num_heads * head_dim).
        """
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step, flattened, without padding.

    `token_ids` and `positions` are (T,); `spans` cover the T rows in order; `hidden_rows`, (N,),
    are the rows whose hidden states the step returns.
    """

    token_ids: Tensor
    positions: Tensor
    spans: list[Span]
    hidden_rows: Tensor


class SlabSpan:
    """One new token for each of R consecutive rows of a slab.

    Args:
        keys: the slab's keys, (capacity, kv_heads, length, head_dim) per layer.
        values: the slab's values, likewise.
        first: index of the first row.
        positions: (R,), positions of the new tokens.
        stored_in: (R,), rows that the new keys and values are written to.
        max_context: maximum number of positions that a row attends to.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        first: int,
        positions: Tensor,
        stored_in: Tensor,
        max_context: int,
    ) -> None:
        _, num_heads, length, _ = keys[0].shape
        device, dtype = keys[0].device, keys[0].dtype
        self.num_rows = len(positions)
        self._keys = keys
        self._values = values
        self._rows = slice(first, first + self.num_rows)
        self._length = length if self.num_rows > FUSED_MAX_ROWS else max_context
        column = positions[:, None]  # (R, 1)
        heads = stored_in[:, None] * num_heads + torch.arange(num_heads, device=device)
        self._stored_at = (heads * length + column).flatten()  # (R * kv_heads,)
        is_future = torch.arange(self._length, device=device) > column  # (R, S)
        self._mask = torch.zeros(is_future.shape, dtype=dtype, device=device)
        self._mask = self._mask.masked_fill_(is_future, -torch.inf)[:, None]  # (R, 1, S)
        self._head_mask = self._mask.repeat_interleave(num_heads, 0)  # (R * kv_heads, 1, S)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Span`."""
        head_dim = keys.shape[-1]
        self._keys[layer].view(-1, head_dim)[self._stored_at] = keys.flatten(0, 1)
        self._values[layer].view(-1, head_dim)[self._stored_at] = values.flatten(0, 1)
        cached_keys = self._keys[layer][self._rows]
        cached_values = self._values[layer][self._rows]
        if self.num_rows <= FUSED_MAX_ROWS:
            cached_keys = cached_keys[:, :, : self._length]
            cached_values = cached_values[:, :, : self._length]
            attended = F.scaled_dot_product_attention(
                queries, cached_keys, cached_values, self._mask[:, None], scale=1.0
            )
        else:
            cached_keys = cached_keys.flatten(0, 1)  # (R * kv_heads, S, head_dim)
            scores = torch.baddbmm(
                self._head_mask, queries.flatten(0, 1), cached_keys.transpose(1, 2)
            )  # (R * kv_heads, group, S)
            attended = torch.bmm(scores.softmax(-1), cached_values.flatten(0, 1))
        return attended.reshape(self.num_rows, -1)


class PromptSpan:
    """Tokens `start` to `stop` of one prompt.

    Args:
        keys: the prompt's keys, (layers, kv_heads, length, head_dim).
        values: the prompt's values, likewise.
        start: index of the first token.
        stop: index after the last token.
    """

    def __init__(self, keys: Tensor, values: Tensor, start: int, stop: int) -> None:
        self.num_rows = stop - start
        self._new = slice(start, stop)
        self._keys = keys[:, :, :stop]
        self._values = values[:, :, :stop]
        self._mask: Tensor | None = None
        if start:
            new, old = torch.arange(start, stop), torch.arange(stop)
            self._mask = torch.zeros(stop - start, stop, dtype=keys.dtype, device=keys.device)
            self._mask.masked_fill_((old > new[:, None]).to(keys.device), -torch.inf)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Span`."""
        cached_keys, cached_values = self._keys[layer], self._values[layer]  # (kv_heads, S, dim)
        cached_keys[:, self._new] = keys.transpose(0, 1)
        cached_values[:, self._new] = values.transpose(0, 1)
        queries = queries.permute(1, 2, 0, 3)  # (kv_heads, group, R, head_dim)
        shape = (*queries.shape[:2], *cached_keys.shape[1:])
        attended = F.scaled_dot_product_attention(
            queries,
            cached_keys[:, None].expand(shape),
            cached_values[:, None].expand(shape),
            self._mask,
            is_causal=self._mask is None,
            scale=1.0,
        )
        return attended.permute(2, 0, 1, 3).reshape(self.num_rows, -1)
