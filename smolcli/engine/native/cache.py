"""Keys and values, a buffer for each sequence, as long as the sequence may become."""

from dataclasses import dataclass

import numpy as np

from smolcli.engine.config import LlamaConfig
from smolcli.engine.native.bindings import SPAN, Array, Kernels, address, aligned_empty
from smolcli.engine.prefix_cache import BLOCK_TOKENS, PrefixCache
from smolcli.engine.sequence import ScheduledSequence, Sequence


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """The tokens of one step: (T,) ids, which sequence has which, and whose next one is wanted."""

    token_ids: Array  # int32
    spans: Array  # of SPAN
    last_rows: Array  # (N,)


class BufferCache:
    """See `model.Cache`.

    Args:
        config: the model's shapes.
        kernels: for which values are laid out.
        prefix_cache_bytes: memory for the beginnings of prompts, kept for prompts to come.
    """

    def __init__(self, config: LlamaConfig, kernels: Kernels, prefix_cache_bytes: int) -> None:
        block_bytes = config.kv_cache_bytes(BLOCK_TOKENS, kernels.dtype.itemsize)
        self.prefix_cache: PrefixCache[Array] = PrefixCache(prefix_cache_bytes, block_bytes)
        self._config = config
        self._kernels = kernels
        self._buffers: dict[Sequence, Array] = {}  # (2, layers, kv_heads, length, head_dim)

    @property
    def num_sequences(self) -> int:
        """See `model.Cache`."""
        return len(self._buffers)

    def bytes_needed(self, sequence: Sequence) -> int:
        """See `model.Cache`."""
        length = self._padded(sequence.max_tokens)
        return self._config.kv_cache_bytes(length, self._kernels.dtype.itemsize)

    def max_length(self, num_bytes: int) -> int:
        """See `model.Cache`."""
        panel = self._kernels.panel
        most = num_bytes // self._config.kv_cache_bytes(panel, self._kernels.dtype.itemsize) * panel
        return min(most, self._config.max_positions)

    def allocate(self, sequence: Sequence) -> None:
        """See `model.Cache`; what is not computed yet is never looked at."""
        if sequence in self._buffers:
            return
        config, length = self._config, self._padded(sequence.max_tokens)
        shape = (2, config.num_layers, config.num_kv_heads, length, config.head_dim)
        buffer = aligned_empty(shape, self._kernels.dtype)
        blocks = self.prefix_cache.match(sequence.prompt_ids)
        sequence.num_cached = len(blocks) * BLOCK_TOKENS
        if blocks:
            np.concatenate(blocks, axis=-2, out=buffer[..., : sequence.num_cached, :])
        self._buffers[sequence] = buffer

    def store_prefix(self, sequence: Sequence) -> None:
        """See `model.Cache`."""
        buffer = self._buffers[sequence]
        self.prefix_cache.insert(
            sequence.prompt_ids, lambda start, stop: buffer[..., start:stop, :].copy()
        )

    def ensure_capacity(self, sequence: Sequence) -> None:
        """See `model.Cache`; there is room from the beginning."""
        assert len(sequence.token_ids) <= self._buffers[sequence].shape[3]

    def batch_key(self, work: ScheduledSequence) -> tuple[int, int]:
        """See `model.Cache`; long pieces first, so that what is short fills the gaps."""
        return work.start - work.stop, -work.stop

    def make_batch(self, works: list[ScheduledSequence]) -> NativeBatch:
        """See `model.Cache`."""
        ids = [t for w in works for t in w.sequence.token_ids[w.start : w.stop]]
        ends = np.cumsum([w.stop - w.start for w in works])
        spans = np.empty(len(works), SPAN)
        for index, (end, work) in enumerate(zip(ends, works, strict=True)):
            num_rows, buffer = work.stop - work.start, self._buffers[work.sequence]
            at = address(buffer)
            spans[index] = (end - num_rows, num_rows, work.start, buffer.shape[3], at)
        completed = np.array([w.completes for w in works])
        return NativeBatch(np.array(ids, np.int32), spans, ends[completed] - 1)

    def free(self, sequence: Sequence) -> None:
        """See `model.Cache`."""
        self._buffers.pop(sequence, None)

    def _padded(self, num_tokens: int) -> int:
        """Rounded up to the number of keys that the kernels read at a time."""
        return -(-num_tokens // self._kernels.panel) * self._kernels.panel
