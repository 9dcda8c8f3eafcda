"""Keys and values of running sequences, in tensors that attention reads without copying.

A sequence keeps its prompt's keys and values in a buffer of its own until the prompt is
complete; then it gets a row in a slab. All rows of a slab are padded to one length, and lengths
come in few sizes, as in a slab allocator (Bonwick 1994): batched products see contiguous
tensors, and a long answer does not pad the short ones. Rows are compact: the last row moves
into the place of one that leaves. A sequence that fills its row moves to the next longer slab.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import groupby

import torch
from torch import Tensor

from smolcli.engine.config import LlamaConfig
from smolcli.engine.prefix_cache import PrefixCache
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.engine.torch_ops.attention import PromptSpan, SlabSpan
from smolcli.engine.torch_ops.batch import Batch, Span

ROW_STEP = 8  # a slab grows and shrinks by this many rows,
STEP_TOKENS = 2048  # or by fewer, if those would hold more tokens than this

LayerTensors = Iterable[tuple[Tensor, Tensor]]  # keys and values of each layer


def padded_length(num_tokens: int) -> int:
    """The slab length for so many tokens: two sizes to an octave, from 32 up."""
    size = 32
    while size < num_tokens:
        size = size * 4 // 3 if size % 3 == 0 else size * 3 // 2
    return size


class PromptBuffer:
    """Keys and values of one prompt; (kv_heads, length, head_dim) a layer."""

    def __init__(self, config: LlamaConfig, length: int, like: Tensor) -> None:
        shape = (2, config.num_layers, config.num_kv_heads, length, config.head_dim)
        self.length = length
        self.data = like.new_empty(shape)
        self.keys, self.values = self.data

    def read(self, _: Sequence) -> LayerTensors:
        """What is stored, layer by layer."""
        return zip(self.keys, self.values, strict=True)


class Slab:
    """Rows of one padded length; (capacity, kv_heads, length, head_dim) a layer.

    What lies beyond a row's tokens is finite, so that a weight of zero hides it. Spare rows lie
    behind the others, and belong to nobody. `step` is what computes a step over the tensors that
    there are now, for who wants to keep it.
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
        """Rows there are for sequences."""
        return max(0, len(self.keys[0]) - self._spare_rows)

    def insert(self, sequence: Sequence, layers: LayerTensors) -> None:
        """Give the sequence the next row, filled with its (kv_heads, n, head_dim) of each layer."""
        row = len(self.rows)
        if row == self.capacity:
            self._resize(row + self._row_step)
        for index, (keys, values) in enumerate(layers):
            self.keys[index][row, :, : keys.shape[1]] = keys
            self.values[index][row, :, : values.shape[1]] = values
        self.rows[sequence] = row

    def remove(self, sequence: Sequence) -> None:
        """Free the sequence's row; the last row takes its place."""
        row, last = self.rows.pop(sequence), len(self.rows)
        if row != last:
            mover = next(s for s, at in self.rows.items() if at == last)
            self.rows[mover] = row
            for tensor in (*self.keys, *self.values):
                tensor[row] = tensor[last]
        if self.capacity - len(self.rows) >= 2 * self._row_step:
            with suppress(RuntimeError):  # no memory for a smaller copy: it stays as it is
                self._resize(len(self.rows) + self._row_step)

    def read(self, sequence: Sequence) -> LayerTensors:
        """The sequence's row, layer by layer."""
        row = self.rows[sequence]
        return ((k[row], v[row]) for k, v in zip(self.keys, self.values, strict=True))

    def _resize(self, capacity: int) -> None:
        self.step = None
        kept = len(self.rows)
        try:
            for tensors in (self.keys, self.values):
                for index, old in enumerate(tensors):
                    new = old.new_empty(capacity + self._spare_rows, *old.shape[1:])
                    new[:kept] = old[:kept]
                    new[kept:] = 0
                    tensors[index] = new
        finally:  # where memory ran out halfway, all get as many rows as the smallest has
            least = min(map(len, (*self.keys, *self.values)))
            for tensors in (self.keys, self.values):
                tensors[:] = [tensor[:least] for tensor in tensors]


class SlabCache:
    """Owner of all keys and values: who has a buffer, who a row, and in which slab.

    Args:
        config: the model's shapes.
        dtype: the dtype of keys and values.
        device: where they live.
        prefix_cache_bytes: memory for the beginnings of prompts, kept for prompts to come.
        padded_length: the length of the slab that holds so many tokens of a sequence.
        spare_rows: of each slab.
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
        self.prefix_cache = PrefixCache(prefix_cache_bytes)
        self._config = config
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._homes: dict[Sequence, PromptBuffer | Slab] = {}
        self._slabs: dict[int, Slab] = {}
        self._padded_length = padded_length
        self._spare_rows = spare_rows

    @property
    def num_sequences(self) -> int:
        """How many sequences hold something."""
        return len(self._homes)

    def bytes_needed(self, sequence: Sequence) -> int:
        """The most bytes that the sequence will hold, padding included."""
        length = self._padded_length(sequence.max_tokens)
        return self._config.kv_cache_bytes(length, self._like.itemsize)

    def max_length(self, num_bytes: int) -> int:
        """See `model.Cache`."""
        length = 0
        while length < self._config.max_positions:
            longer = self._padded_length(length + 1)
            if self._config.kv_cache_bytes(longer, self._like.itemsize) > num_bytes:
                break
            length = longer
        return min(length, self._config.max_positions)

    def allocate(self, sequence: Sequence) -> None:
        """Give a new sequence the buffer of its prompt, filled as far as its beginning is known."""
        if sequence in self._homes:
            return
        buffer = PromptBuffer(self._config, len(sequence.prompt_ids), self._like)
        sequence.num_cached = self.prefix_cache.fill(sequence.prompt_ids, buffer.data)
        self._homes[sequence] = buffer

    def store_prefix(self, sequence: Sequence) -> None:
        """Keep a prompt that is computed, for those that begin like it."""
        home = self._homes[sequence]
        assert isinstance(home, PromptBuffer), "only a prompt's own buffer holds it whole"
        self.prefix_cache.keep(sequence.prompt_ids, home.data)

    def ensure_capacity(self, sequence: Sequence) -> None:
        """See that all tokens of the sequence, the newest included, have a place."""
        home = self._homes[sequence]
        if home.length < len(sequence.token_ids):
            slab = self._slab(self._padded_length(len(sequence.token_ids)))
            slab.insert(sequence, home.read(sequence))
            self.free(sequence)
            self._homes[sequence] = slab

    def slab_of(self, sequence: Sequence) -> Slab | None:
        """The slab that the sequence has a row in, if its prompt is complete."""
        home = self._homes[sequence]
        return home if isinstance(home, Slab) else None

    def batch_key(self, work: ScheduledSequence) -> tuple[int, int]:
        """Where the sequence's row lies; works in this order make the fewest spans."""
        home = self._homes[work.sequence]
        return (home.length, home.rows[work.sequence]) if isinstance(home, Slab) else (1 << 62, 0)

    def flat_batch(self, works: list[ScheduledSequence]) -> Batch:
        """The input of a forward pass over works with room, in the order of their places."""
        token_ids = [t for w in works for t in w.sequence.token_ids[w.start : w.stop]]
        positions = [p for w in works for p in range(w.start, w.stop)]
        ends = torch.tensor([w.stop - w.start for w in works]).cumsum(0) - 1
        completed = torch.tensor([w.completes for w in works])
        return Batch(
            token_ids=torch.tensor(token_ids, device=self._like.device),
            positions=torch.tensor(positions, device=self._like.device),
            spans=self._spans(works),
            last_rows=ends[completed].to(self._like.device),
        )

    def free(self, sequence: Sequence) -> None:
        """Drop what the sequence holds, if anything."""
        home = self._homes.pop(sequence, None)
        if isinstance(home, Slab):
            home.remove(sequence)
            if not home.rows:
                del self._slabs[home.length]

    def _slab(self, length: int) -> Slab:
        if length not in self._slabs:
            self._slabs[length] = Slab(self._config, length, self._like, self._spare_rows)
        return self._slabs[length]

    def _spans(self, works: list[ScheduledSequence]) -> list[Span]:
        """The works in runs that lie side by side; each prompt is a run of its own."""

        def gap(item: tuple[int, ScheduledSequence]) -> tuple[int, int]:
            length, row = self.batch_key(item[1])
            return length, row - item[0]

        runs = groupby(enumerate(works), key=gap)
        return [self._span([work for _, work in run]) for _, run in runs]

    def _span(self, works: list[ScheduledSequence]) -> Span:
        """Works on one prompt, or on rows of one slab that lie side by side."""
        home = self._homes[works[0].sequence]
        if isinstance(home, PromptBuffer):
            return PromptSpan(home.keys, home.values, works[0].start, works[0].stop)
        first = home.rows[works[0].sequence]
        rows = torch.arange(first, first + len(works), device=self._like.device)
        positions = torch.tensor([w.start for w in works], device=self._like.device)
        reach = max(w.stop for w in works)
        return SlabSpan(home.keys, home.values, first, positions, rows, reach)


class FlatCache(SlabCache):
    """The cache of a model that computes all works of a step in one pass."""

    def make_batch(self, works: list[ScheduledSequence]) -> Batch:
        """See `model.Cache`."""
        return self.flat_batch(works)
