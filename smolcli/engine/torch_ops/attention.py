"""Attention of a batch over the cache: a new token of many rows, or a piece of a prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 4  # up to here one fused attention call is faster than batched products


class SlabSpan:
    """One new token for each of R neighbouring rows of a slab.

    Args:
        keys, values: the slab's, (capacity, kv_heads, length, head_dim) a layer.
        first: the first of the rows.
        positions: (R,), of the new tokens.
        stored_in: (R,), the rows that take the new keys and values.
        reach: no row attends to more positions than these.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        first: int,
        positions: Tensor,
        stored_in: Tensor,
        reach: int,
    ) -> None:
        _, num_heads, length, _ = keys[0].shape
        device, dtype = keys[0].device, keys[0].dtype
        self.num_rows = len(positions)
        self._keys = keys
        self._values = values
        self._rows = slice(first, first + self.num_rows)
        self._length = length if self.num_rows > FEW_ROWS else reach
        at = positions[:, None]  # (R, 1)
        heads = stored_in[:, None] * num_heads + torch.arange(num_heads, device=device)
        self._stored_at = (heads * length + at).flatten()  # (R * kv_heads,)
        hidden = torch.arange(self._length, device=device) > at  # (R, S)
        self._mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        self._mask = self._mask.masked_fill_(hidden, -torch.inf)[:, None]  # (R, 1, S)
        self._head_mask = self._mask.repeat_interleave(num_heads, 0)  # (R * kv_heads, 1, S)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `model.Span`."""
        head_dim = keys.shape[-1]
        self._keys[layer].view(-1, head_dim)[self._stored_at] = keys.flatten(0, 1)
        self._values[layer].view(-1, head_dim)[self._stored_at] = values.flatten(0, 1)
        cached_keys = self._keys[layer][self._rows]
        cached_values = self._values[layer][self._rows]
        if self.num_rows <= FEW_ROWS:
            cached_keys = cached_keys[:, :, : self._length]
            cached_values = cached_values[:, :, : self._length]
            mixed = F.scaled_dot_product_attention(
                queries, cached_keys, cached_values, self._mask[:, None], scale=1.0
            )
        else:
            cached_keys = cached_keys.flatten(0, 1)  # (R * kv_heads, S, head_dim)
            scores = torch.baddbmm(
                self._head_mask, queries.flatten(0, 1), cached_keys.transpose(1, 2)
            )  # (R * kv_heads, group, S)
            mixed = torch.bmm(scores.softmax(-1), cached_values.flatten(0, 1))
        return mixed.reshape(self.num_rows, -1)


class PromptSpan:
    """Tokens `start` to `stop` of one prompt.

    Args:
        keys, values: the prompt's, (layers, kv_heads, length, head_dim).
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
        """See `model.Span`."""
        cached_keys, cached_values = self._keys[layer], self._values[layer]  # (kv_heads, S, dim)
        cached_keys[:, self._new] = keys.transpose(0, 1)
        cached_values[:, self._new] = values.transpose(0, 1)
        queries = queries.permute(1, 2, 0, 3)  # (kv_heads, group, R, head_dim)
        shape = (*queries.shape[:2], *cached_keys.shape[1:])
        mixed = F.scaled_dot_product_attention(
            queries,
            cached_keys[:, None].expand(shape),
            cached_values[:, None].expand(shape),
            self._mask,
            is_causal=self._mask is None,
            scale=1.0,
        )
        return mixed.permute(2, 0, 1, 3).reshape(self.num_rows, -1)
