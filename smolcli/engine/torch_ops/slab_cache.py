"""The KV cache as tensors that attention reads without copying.

A sequence keeps the keys and values of its prompt in a buffer of its own until the prompt has been
computed; then it gets a row in a slab. All rows of a slab are padded to the same length, and there
are few different lengths, as in a slab allocator (Bonwick 1994): batched products see contiguous
tensors, and a long answer does not pad the short ones. Rows are compact: when a sequence leaves,
the last row moves to its place. A sequence that fills its row moves to the next longer slab.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import accumulate, groupby

import torch
from torch import Tensor

from smolcli.engine.config import LlamaConfig
from smolcli.engine.prefix_cache import BLOCK_TOKENS, PrefixCache
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.engine.torch_ops.attention import Batch, PromptSpan, SlabSpan, Span

ROW_STEP = 8  # a slab grows and shrinks by this many rows,
STEP_TOKENS = 2048  # or by fewer, if those would hold more tokens than this

LayerTensors = Iterable[tuple[Tensor, Tensor]]  # keys and values of each layer


def padded_length(num_tokens: int) -> int:
    """The slab length for a number of tokens: two sizes per octave, starting at 32."""
    size = 32
    while size < num_tokens:
        size = size * 4 // 3 if size % 3 == 0 else size * 3 // 2
    return size


class PromptBuffer:
    """The keys and values of one prompt, (kv_heads, length, head_dim) per layer."""

    def __init__(self, config: LlamaConfig, length: int, like: Tensor) -> None:
        shape = (2, config.num_layers, config.num_kv_heads, length, config.head_dim)
        self.length = length
        self.data = like.new_empty(shape)
        self.keys, self.values = self.data

    def read(self, _: Sequence) -> LayerTensors:
        """The stored keys and values, layer by layer."""
        return zip(self.keys, self.values, strict=True)


class Slab:
    """Rows of one padded length, (capacity, kv_heads, length, head_dim) per layer.

    Padding is always finite, so that a weight of zero hides it. Spare rows follow the others and
    belong to no sequence. `step` computes a step over the current tensors, for callers that keep
    one; it is dropped when the tensors are replaced.
    """

    def __init__(self, config: LlamaConfig, length: int, like: Tensor, spare_rows: int) -> None:
        self.length = length
        self.rows: dict[Sequence, int] = {}
        self.step: Callable[[list[ScheduledSequence]], Tensor] | None = None
        self._row_step = max(1, min(ROW_STEP, STEP_TOKENS // length))
        self._spare_rows = spare_rows
        empty = like.new_empty(0, config.num_kv_heads, length, config.head_dim)
        self.keys = [empty] * config.num_layers
        self.values = [empty] * config.num_layers

    @property
    def capacity(self) -> int:
        """The number of rows for sequences."""
        return max(0, len(self.keys[0]) - self._spare_rows)

    def insert(self, sequence: Sequence, layers: LayerTensors) -> None:
        """Give the sequence the next row.

        Args:
            sequence: the sequence.
            layers: its keys and values, (kv_heads, n, head_dim) per layer.
        """
        row = len(self.rows)
        if row == self.capacity:
            self._resize(row + self._row_step)
        for index, (keys, values) in enumerate(layers):
            self.keys[index][row, :, : keys.shape[1]] = keys
            self.values[index][row, :, : values.shape[1]] = values
        self.rows[sequence] = row

    def remove(self, sequence: Sequence) -> None:
        """Free the sequence's row; the last row moves to its place."""
        row, last = self.rows.pop(sequence), len(self.rows)
        if row != last:
            mover = next(s for s, index in self.rows.items() if index == last)
            self.rows[mover] = row
            for tensor in (*self.keys, *self.values):
                tensor[row] = tensor[last]
        if self.capacity - len(self.rows) >= 2 * self._row_step:
            with suppress(RuntimeError):  # no memory for a smaller copy: keep this one
                self._resize(len(self.rows) + self._row_step)

    def read(self, sequence: Sequence) -> LayerTensors:
        """The sequence's row, layer by layer."""
        row = self.rows[sequence]
        return ((k[row], v[row]) for k, v in zip(self.keys, self.values, strict=True))

    def _resize(self, capacity: int) -> None:
        self.step = None
        num_kept = len(self.rows)
        try:
            for tensors in (self.keys, self.values):
                for index, old in enumerate(tensors):
                    new = old.new_empty(capacity + self._spare_rows, *old.shape[1:])
                    new[:num_kept] = old[:num_kept]
                    new[num_kept:] = 0
                    tensors[index] = new
        finally:  # if memory ran out halfway, cut all tensors to the smallest one
            smallest = min(map(len, (*self.keys, *self.values)))
            for tensors in (self.keys, self.values):
                tensors[:] = [tensor[:smallest] for tensor in tensors]


class SlabCache:
    """Keys and values of all sequences: in a prompt buffer first, then in a row of a slab.

    Args:
        config: the model's shape.
        dtype: the dtype of keys and values.
        device: the device that holds them.
        prefix_cache_bytes: memory for the prefix cache; 0 disables it.
        padded_length: the length of the slab for a number of tokens.
        spare_rows: the number of spare rows per slab.
    """

    def __init__(
        self,
        config: LlamaConfig,
        dtype: torch.dtype,
        device: torch.device,
        prefix_cache_bytes: int,
        padded_length: Callable[[int], int] = padded_length,
        spare_rows: int = 0,
    ) -> None:
        block_bytes = config.kv_cache_bytes(BLOCK_TOKENS, dtype.itemsize)
        self.prefix_cache: PrefixCache[Tensor] = PrefixCache(prefix_cache_bytes, block_bytes)
        self._config = config
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._storage: dict[Sequence, PromptBuffer | Slab] = {}
        self._slabs: dict[int, Slab] = {}
        self._padded_length = padded_length
        self._spare_rows = spare_rows

    @property
    def num_sequences(self) -> int:
        """See `interfaces.KVCache`."""
        return len(self._storage)

    def bytes_needed(self, sequence: Sequence) -> int:
        """See `interfaces.KVCache`."""
        length = self._padded_length(sequence.max_tokens)
        return self._config.kv_cache_bytes(length, self._like.itemsize)

    def max_length(self, num_bytes: int) -> int:
        """See `interfaces.KVCache`."""
        length = 0
        while length < self._config.max_positions:
            longer = self._padded_length(length + 1)
            if self._config.kv_cache_bytes(longer, self._like.itemsize) > num_bytes:
                break
            length = longer
        return min(length, self._config.max_positions)

    def allocate(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`; allocates the buffer of the prompt."""
        if sequence in self._storage:
            return
        buffer = PromptBuffer(self._config, len(sequence.prompt_ids), self._like)
        blocks = self.prefix_cache.match(sequence.reusable_ids)
        sequence.num_cached = sequence.num_reused = len(blocks) * BLOCK_TOKENS
        if blocks:
            buffer.data[..., : sequence.num_cached, :] = torch.cat(blocks, dim=-2)
        self._storage[sequence] = buffer

    def store_prefix(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`; does nothing once the prompt has left its buffer."""
        buffer = self._storage[sequence]
        if not isinstance(buffer, PromptBuffer):
            return
        data = buffer.data
        self.prefix_cache.insert(
            sequence.storable_ids, lambda start, stop: data[..., start:stop, :].clone()
        )

    def ensure_capacity(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`; moves the sequence to a longer slab if necessary."""
        storage = self._storage[sequence]
        if storage.length < len(sequence.token_ids):
            slab = self._slab(self._padded_length(len(sequence.token_ids)))
            slab.insert(sequence, storage.read(sequence))
            self.free(sequence)
            self._storage[sequence] = slab

    def slab_of(self, sequence: Sequence) -> Slab | None:
        """The slab that holds the sequence; None while it is in a prompt buffer."""
        storage = self._storage[sequence]
        return storage if isinstance(storage, Slab) else None

    def batch_key(self, item: ScheduledSequence) -> tuple[int, int]:
        """See `interfaces.KVCache`; slab by slab and row by row, then prompts."""
        slab = self.slab_of(item.sequence)
        return (slab.length, slab.rows[item.sequence]) if slab else (1 << 62, 0)

    def flat_batch(self, items: list[ScheduledSequence]) -> Batch:
        """The input of one forward pass over all items, sorted by `batch_key`."""
        token_ids = [t for i in items for t in i.sequence.token_ids[i.start : i.stop]]
        positions = [p for i in items for p in range(i.start, i.stop)]
        ends = accumulate(i.stop - i.start for i in items)
        rows = [r for e, i in zip(ends, items, strict=True) for r in range(e - i.num_hidden, e)]
        return Batch(
            token_ids=torch.tensor(token_ids, device=self._like.device),
            positions=torch.tensor(positions, device=self._like.device),
            spans=self._spans(items),
            hidden_rows=torch.tensor(rows, dtype=torch.long, device=self._like.device),
        )

    def free(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`."""
        storage = self._storage.pop(sequence, None)
        if isinstance(storage, Slab):
            storage.remove(sequence)
            if not storage.rows:
                del self._slabs[storage.length]

    def _slab(self, length: int) -> Slab:
        if length not in self._slabs:
            self._slabs[length] = Slab(self._config, length, self._like, self._spare_rows)
        return self._slabs[length]

    def _spans(self, items: list[ScheduledSequence]) -> list[Span]:
        """Group consecutive rows of a slab into spans; each prompt is a span of its own."""

        def offset(pair: tuple[int, ScheduledSequence]) -> tuple[int, int]:
            length, row = self.batch_key(pair[1])
            return length, row - pair[0]

        runs = groupby(enumerate(items), key=offset)
        return [self._span([item for _, item in run]) for _, run in runs]

    def _span(self, items: list[ScheduledSequence]) -> Span:
        storage = self._storage[items[0].sequence]
        if isinstance(storage, PromptBuffer):
            return PromptSpan(storage.keys, storage.values, items[0].start, items[0].stop)
        first = storage.rows[items[0].sequence]
        rows = torch.arange(first, first + len(items), device=self._like.device)
        positions = torch.tensor([i.start for i in items], device=self._like.device)
        max_context = max(i.stop for i in items)
        return SlabSpan(storage.keys, storage.values, first, positions, rows, max_context)


class BatchedSlabCache(SlabCache):
    """The cache of a model that computes a whole step in one pass."""

    def make_batch(self, items: list[ScheduledSequence]) -> Batch:
        """See `interfaces.KVCache`."""
        return self.flat_batch(items)
