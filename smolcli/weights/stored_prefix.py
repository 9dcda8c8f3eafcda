"""The KV cache of the prefix that most prompts of a model share, kept between processes.

Most prompts begin with the model's own system prompt, which is longer than a short question. Its
keys and values do not depend on the rest of a prompt, so they are stored next to the packed
weights, and a new process fills its prefix cache with them.
"""

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from smolcli.atomic import write_atomically
from smolcli.engine.config import LlamaConfig
from smolcli.engine.native.bindings import Kernels
from smolcli.engine.prefix_cache import BLOCK_TOKENS, PrefixCache
from smolcli.engine.quantized import Array
from smolcli.weights.packed import packed_path
from smolcli.weights.store import ModelFiles


class StoredPrefix:
    """The file with the stored KV cache of one model.

    Args:
        files: the model.
        config: its config.json.
        kernels: the library that computes them, on whose build the bits may depend.
    """

    def __init__(self, files: ModelFiles, config: LlamaConfig, kernels: Kernels) -> None:
        self.is_restored = False
        self._weights = packed_path(files, config, kernels)
        self._path = self._weights.with_suffix(".kv")
        self._source = kernels.source
        shape = (2, config.num_layers, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
        self._shape, self._dtype = shape, kernels.cache_dtype

    def restore(self, cache: PrefixCache[Array]) -> None:
        """Fill a prefix cache with the stored blocks, if they are intact and from this build."""
        try:
            packed = self._path.read_bytes()
            head, _, data = packed[4:].partition(b"\n")
            if zlib.crc32(packed[4:]) != int.from_bytes(packed[:4], "little"):
                return
            record = json.loads(head)
            if record["source"] != self._source or record["block_tokens"] != BLOCK_TOKENS:
                return
            blocks = np.frombuffer(data, self._dtype).reshape(-1, *self._shape)
        except (OSError, ValueError, KeyError, TypeError):
            return
        cache.insert(record["token_ids"], lambda start, _: blocks[start // BLOCK_TOKENS])
        self.is_restored = True

    def save(self, cache: PrefixCache[Array], token_ids: Sequence[int]) -> None:
        """Store the blocks of a prefix that a prefix cache holds.

        Args:
            cache: the prefix cache.
            token_ids: the prefix.
        """
        blocks = cache.match([*token_ids, -1])  # the last token never counts
        if not blocks or not self._weights.exists():
            return
        ids = list(token_ids)[: len(blocks) * BLOCK_TOKENS]
        record = {"source": self._source, "block_tokens": BLOCK_TOKENS, "token_ids": ids}
        head = json.dumps(record).encode()
        body = head + b"\n" + np.stack(blocks).tobytes()
        with suppress(OSError):
            write_atomically(self._path, zlib.crc32(body).to_bytes(4, "little") + body)
