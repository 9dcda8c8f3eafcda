"""The KV cache of the native kernels: one buffer per sequence, allocated at its full length."""

from dataclasses import dataclass

import numpy as np

from smolcli.engine.config import LlamaConfig
from smolcli.engine.native.bindings import SPAN, Array, Kernels, address, aligned_empty
from smolcli.engine.prefix_cache import BLOCK_TOKENS, PrefixCache
from smolcli.engine.sequence import ScheduledSequence, Sequence


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """The T tokens of one step."""

    token_ids: Array  # (T,), int32
    spans: Array  # (sequences,), SPAN; also says which hidden states are wanted


class BufferCache:
    """See `interfaces.KVCache`.

    Args:
        config: the model's shape.
        kernels: the library, which determines dtype and padding.
        prefix_cache_bytes: memory for the prefix cache; 0 disables it.
    """

    def __init__(self, config: LlamaConfig, kernels: Kernels, prefix_cache_bytes: int) -> None:
        block_bytes = config.kv_cache_bytes(BLOCK_TOKENS, kernels.cache_dtype.itemsize)
        self.prefix_cache: PrefixCache[Array] = PrefixCache(prefix_cache_bytes, block_bytes)
        self._config = config
        self._kernels = kernels
        self._buffers: dict[Sequence, Array] = {}  # (2, layers, kv_heads, length, head_dim)

    @property
    def num_sequences(self) -> int:
        """See `interfaces.KVCache`."""
        return len(self._buffers)

    def bytes_needed(self, sequence: Sequence) -> int:
        """See `interfaces.KVCache`."""
        length = self._padded(sequence.max_tokens)
        return self._config.kv_cache_bytes(length, self._kernels.cache_dtype.itemsize)

    def max_length(self, num_bytes: int) -> int:
        """See `interfaces.KVCache`."""
        panel = self._kernels.panel
        panel_bytes = self._config.kv_cache_bytes(panel, self._kernels.cache_dtype.itemsize)
        return min(num_bytes // panel_bytes * panel, self._config.max_positions)

    def allocate(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`; the rest of the buffer stays uninitialized."""
        if sequence in self._buffers:
            return
        config, length = self._config, self._padded(sequence.max_tokens)
        shape = (2, config.num_layers, config.num_kv_heads, length, config.head_dim)
        buffer = aligned_empty(shape, self._kernels.cache_dtype)
        blocks = self.prefix_cache.match(sequence.reusable_ids)
        sequence.num_cached = sequence.num_reused = len(blocks) * BLOCK_TOKENS
        if blocks:
            np.concatenate(blocks, axis=-2, out=buffer[..., : sequence.num_cached, :])
        self._buffers[sequence] = buffer

    def store_prefix(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`."""
        buffer = self._buffers[sequence]
        self.prefix_cache.insert(
            sequence.storable_ids, lambda start, stop: buffer[..., start:stop, :].copy()
        )

    def ensure_capacity(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`; the buffer has its full length from the start."""
        assert len(sequence.token_ids) <= self._buffers[sequence].shape[3]

    def batch_key(self, item: ScheduledSequence) -> tuple[int, int]:
        """See `interfaces.KVCache`; long spans first, so that short ones fill the gaps."""
        return -item.num_rows, -item.stop

    def make_batch(self, items: list[ScheduledSequence]) -> NativeBatch:
        """See `interfaces.KVCache`."""
        ids = [token_id for item in items for token_id in item.token_ids]
        spans, first_row = [], 0
        for item in items:
            buffer = self._buffers[item.sequence]
            place = (item.start, buffer.shape[3], 0, address(buffer))
            spans.append((first_row, item.num_rows, item.num_hidden, *place))
            first_row += item.num_rows
        return NativeBatch(np.array(ids, np.int32), np.array(spans, SPAN))

    def free(self, sequence: Sequence) -> None:
        """See `interfaces.KVCache`."""
        self._buffers.pop(sequence, None)

    def _padded(self, num_tokens: int) -> int:
        """Round up to a multiple of the number of keys that the kernels read at once."""
        return -(-num_tokens // self._kernels.panel) * self._kernels.panel
