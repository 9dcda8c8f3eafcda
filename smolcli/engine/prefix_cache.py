"""Keys and values of prompt beginnings, shared by all prompts that begin alike.

A prompt is cut into blocks, and each block is known by its tokens and all before it, as in
vLLM's automatic prefix caching (Kwon et al. 2023, arXiv:2309.06180).
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK_TOKENS = 4

BlockKey = tuple[int, tuple[int, ...]]  # the number of the block before, and the block's tokens


@dataclass(frozen=True, slots=True)
class Block:
    """One block's keys and values, (2, layers, kv_heads, BLOCK_TOKENS, head_dim)."""

    number: int
    data: Any


class PrefixCache:
    """Blocks of prompts, the least recently used of them dropped.

    Args:
        max_bytes: memory that the blocks may take; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_hit_tokens = 0
        self.num_asked_tokens = 0
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[BlockKey, Block] = OrderedDict()
        self._num_made = 0

    def fill(self, prompt_ids: list[int], data: Any) -> int:
        """Copy the longest known beginning of a prompt; its last token is always left to compute.

        Args:
            prompt_ids: the prompt.
            data: (2, layers, kv_heads, len(prompt_ids), head_dim), written to.

        Returns:
            How many tokens are filled.
        """
        found = []
        before = 0
        for tokens in _cut(prompt_ids[:-1]):
            block = self._blocks.get((before, tokens))
            if block is None:
                break
            self._blocks.move_to_end((before, tokens))
            found.append(block.data)
            before = block.number
        num_tokens = len(found) * BLOCK_TOKENS
        for index, block in enumerate(found):
            data[..., index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS, :] = block
        self.num_hit_tokens += num_tokens
        self.num_asked_tokens += len(prompt_ids)
        return num_tokens

    def keep(self, prompt_ids: list[int], data: Any) -> None:
        """Remember the blocks of a prompt that is computed; shapes as in `fill`."""
        before = 0
        for index, tokens in enumerate(_cut(prompt_ids)):
            block = self._blocks.get((before, tokens))
            if block is None:
                at = index * BLOCK_TOKENS
                block = self._add((before, tokens), data[..., at : at + BLOCK_TOKENS, :])
                if block is None:
                    return
            before = block.number

    def _add(self, key: BlockKey, data: Any) -> Block | None:
        size = data.nbytes
        while self._blocks and self.num_bytes + size > self._max_bytes:
            self._blocks.popitem(last=False)
            self.num_bytes -= size
        if size > self._max_bytes:
            return None
        self._num_made += 1
        self.num_bytes += size
        block = self._blocks[key] = Block(
            self._num_made, data.copy() if isinstance(data, np.ndarray) else data.clone()
        )
        return block


def _cut(token_ids: list[int]) -> list[tuple[int, ...]]:
    """Whole blocks only."""
    ends = range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS)
    return [tuple(token_ids[end - BLOCK_TOKENS : end]) for end in ends]
