"""Keys and values of earlier prompts and answers, reused by prompts that start with their tokens.

Prompts are cut into blocks, and a block is identified by its tokens and all tokens before it, as in
vLLM's automatic prefix caching (Kwon et al. 2023, arXiv:2309.06180). The blocks form a tree. Only
leaves are evicted, because a block without the blocks before it can never be found. The leaf to
evict is the one with the fewest hits, aged as in LFU-DA (Arlitt et al. 2000): a block's priority is
its number of hits plus the cache's age when it was last used.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# On average, half a token per prompt is computed again; blocks of 1 would take longer to copy. An
# even number, because the native kernels may store the values of two tokens side by side.
BLOCK_TOKENS = 2
MAX_HITS = 64  # bounds how long a prefix that is no longer used outlives newer ones

KV = TypeVar("KV")  # the keys and values of BLOCK_TOKENS tokens, as a model's KV cache keeps them


@dataclass(eq=False, slots=True)
class Block(Generic[KV]):
    """A node of the tree; the root has no data."""

    tokens: tuple[int, ...] = ()
    data: KV | None = None
    parent: "Block[KV] | None" = None
    children: dict[tuple[int, ...], "Block[KV]"] = field(default_factory=dict)
    num_hits: int = 0
    priority: int = 0
    last_use: int = 0  # breaks ties: the least recently used is evicted first


class PrefixCache(Generic[KV]):
    """A bounded tree of prompt blocks.

    A new block replaces blocks of its own priority or less, so that one long prompt does not evict
    what many prompts share. A prompt that finds no room increases the age by one hit, so that
    blocks that are no longer used are evicted eventually.

    Args:
        max_bytes: memory for blocks; 0 disables the cache.
        block_bytes: memory of one block.
    """

    def __init__(self, max_bytes: int, block_bytes: int) -> None:
        self.num_hit_tokens = 0
        self.num_lookup_tokens = 0
        self.num_blocks = 0
        self._max_blocks = max_bytes // block_bytes
        self._block_bytes = block_bytes
        self._root: Block[KV] = Block()
        self._age = 0
        self._clock = 0
        self._leaves: list[tuple[int, int, Block[KV]]] = []  # heap; may hold outdated entries

    @property
    def num_bytes(self) -> int:
        """Memory that the blocks occupy."""
        return self.num_blocks * self._block_bytes

    def match(self, prompt_ids: list[int]) -> list[KV]:
        """Find the longest cached prefix of a prompt.

        The prompt's last token is never part of it, because computing that token yields the next
        one.

        Returns:
            The data of consecutive blocks of BLOCK_TOKENS tokens each, from the start.
        """
        path = self._find(prompt_ids[:-1])
        for block in path:
            block.num_hits = min(block.num_hits + 1, MAX_HITS)
            self._touch(block)
        self._push_if_leaf(path[-1] if path else self._root)
        self.num_hit_tokens += len(path) * BLOCK_TOKENS
        self.num_lookup_tokens += len(prompt_ids)
        return [block.data for block in path if block.data is not None]

    def insert(self, token_ids: list[int], copy_block: Callable[[int, int], KV]) -> None:
        """Add the blocks of computed tokens, from the start and as many as fit.

        Args:
            token_ids: a prompt, or a prompt and its answer.
            copy_block: copies the keys and values of the tokens from the first index up to the
                second.
        """
        path = self._find(token_ids)
        tail = path[-1] if path else self._root
        first_stop = (len(path) + 1) * BLOCK_TOKENS
        try:
            for stop in range(first_stop, len(token_ids) + 1, BLOCK_TOKENS):
                if not self._make_room(keep=tail):
                    self._age += 1
                    break
                start = stop - BLOCK_TOKENS
                tokens = tuple(token_ids[start:stop])
                block = Block(tokens, copy_block(start, stop), tail)
                self._touch(block)
                tail.children[tokens] = block
                tail = block
                self.num_blocks += 1
        finally:  # copying may have failed
            self._push_if_leaf(tail)

    def _find(self, token_ids: list[int]) -> list[Block[KV]]:
        path: list[Block[KV]] = []
        block = self._root
        for stop in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
            child = block.children.get(tuple(token_ids[stop - BLOCK_TOKENS : stop]))
            if child is None:
                break
            path.append(block := child)
        return path

    def _touch(self, block: Block[KV]) -> None:
        self._clock += 1
        block.last_use = self._clock
        block.priority = self._age + block.num_hits

    def _make_room(self, keep: Block[KV]) -> bool:
        """Evict blocks until one more fits; returns whether it does."""
        while self.num_blocks >= self._max_blocks:
            victim = self._pop_leaf(keep)
            if victim is None:
                return False
            if victim.priority > self._age:
                self._push_if_leaf(victim)
                return False
            parent = victim.parent
            assert parent is not None
            del parent.children[victim.tokens]
            victim.parent = None
            self.num_blocks -= 1
            self._push_if_leaf(parent)
        return True

    def _pop_leaf(self, keep: Block[KV]) -> Block[KV] | None:
        """The leaf with the lowest priority other than `keep`."""
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if _is_current(entry) and entry[2] is not keep:
                return entry[2]
        return None

    def _push_if_leaf(self, block: Block[KV]) -> None:
        if block.parent is None or block.children:
            return
        if len(self._leaves) > 2 * self.num_blocks:  # mostly outdated or repeated entries
            self._leaves = list(filter(_is_current, set(self._leaves)))
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (block.priority, block.last_use, block))


def _is_current(leaf: tuple[int, int, Block[KV]]) -> bool:
    """Whether a block is still a leaf of the tree, and has not been used since."""
    _, last_use, block = leaf
    return block.parent is not None and not block.children and block.last_use == last_use
