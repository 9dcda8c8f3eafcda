"""The prefix cache by itself: what it finds, keeps and evicts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolcli.engine.prefix_cache import BLOCK_TOKENS, MAX_HITS, PrefixCache


def make_cache(num_tokens: int) -> PrefixCache[list[int]]:
    return PrefixCache(num_tokens // BLOCK_TOKENS * 100 + 99, 100)


def ask(cache: PrefixCache[list[int]], prompt: list[int]) -> int:
    """Look up a prompt and insert it; returns how many of its tokens were cached.

    A block's data is the whole prefix that it ends, which is what its keys and values depend on.
    """
    blocks = cache.match(prompt)
    for index, data in enumerate(blocks):
        assert data == prompt[: (index + 1) * BLOCK_TOKENS]
    cache.insert(prompt, lambda start, stop: prompt[:stop])
    return len(blocks) * BLOCK_TOKENS


def prompt_of(first: int, num_tokens: int) -> list[int]:
    return list(range(first, first + num_tokens))


def test_the_last_token_is_always_left_to_compute() -> None:
    cache = make_cache(40)
    prompt = prompt_of(0, 8)
    assert [ask(cache, prompt) for _ in range(2)] == [0, 8 - BLOCK_TOKENS]
    assert ask(cache, [*prompt, 99]) == 8


@pytest.mark.parametrize("num_shared", range(1, 10))
def test_at_most_one_shared_token_is_computed_again(num_shared: int) -> None:
    """Each costs 0.8 to 2 ms before the first token. With blocks of 4, it was up to three."""
    cache = make_cache(100)
    shared = prompt_of(0, num_shared)
    ask(cache, [*shared, *prompt_of(100, 10)])
    assert ask(cache, [*shared, *prompt_of(200, 10)]) >= num_shared - 1


def test_a_prompt_longer_than_the_cache_is_kept_from_its_start() -> None:
    cache = make_cache(40)
    assert [ask(cache, prompt_of(0, 60)) for _ in range(5)] == [0, 40, 40, 40, 40]


def test_leaves_are_evicted_before_the_blocks_they_extend() -> None:
    cache = make_cache(40)
    ask(cache, prompt_of(0, 40))
    ask(cache, prompt_of(100, 16))
    assert ask(cache, prompt_of(0, 40)) == 24, "the end made room, the start is still found"


def test_blocks_before_a_failed_copy_can_be_evicted() -> None:
    cache = make_cache(40)

    def copy(start: int, stop: int) -> list[int]:
        if start >= 20:
            raise MemoryError
        return prompt_of(0, stop)

    with pytest.raises(MemoryError):
        cache.insert(prompt_of(0, 40), copy)
    assert [ask(cache, prompt_of(100, 41)) for _ in range(3)][-1] == 40


def test_what_is_shared_survives_one_long_document() -> None:
    """A prompt longer than the cache once evicted everything."""
    cache = make_cache(80)
    system = prompt_of(0, 40)
    for user in range(5):
        ask(cache, [*system, 1000 + user])
    ask(cache, prompt_of(2000, 400))
    assert ask(cache, [*system, 7]) == 40
    assert ask(cache, prompt_of(2000, 400)) == 40, "and the document as far as it fitted"


@pytest.mark.parametrize("num_shared", [3, 30])
def test_what_is_shared_most_survives_many_different_prompts(num_shared: int) -> None:
    cache = make_cache(80)
    hot, warm = prompt_of(0, 41), prompt_of(100, 41)
    for _ in range(num_shared):
        ask(cache, hot)
    ask(cache, warm)
    ask(cache, warm)
    for number in range(num_shared - 1):
        ask(cache, prompt_of(1000 * (number + 1), 80))
    assert cache.match(hot) != []
    assert len(cache.match(hot)) > len(cache.match(warm))


def test_what_was_popular_once_gives_way() -> None:
    cache = make_cache(40)
    for _ in range(1000):
        ask(cache, prompt_of(0, 41))
    for number in range(2 * MAX_HITS):
        ask(cache, prompt_of(1000 * (number + 1), 41))
    new = prompt_of(500_000, 41)
    ask(cache, new)
    assert ask(cache, new) == 40


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache: PrefixCache[list[int]] = PrefixCache(0, 100)
    assert [ask(cache, prompt_of(0, 60)) for _ in range(2)] == [0, 0]
    assert cache.num_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 70)), max_size=60), st.integers(0, 12))
@settings(max_examples=150)
def test_it_stays_within_its_bounds_and_finds_only_what_it_was_given(
    asked: list[tuple[int, int]], num_blocks: int
) -> None:
    """Whatever is asked in whatever order; `ask` checks that data belongs to its prefix."""
    cache = make_cache(num_blocks * BLOCK_TOKENS)
    source = random.Random(1)
    texts = [[source.randrange(3) for _ in range(70)] for _ in range(6)]
    for text, length in asked:
        prompt = texts[text][:length]
        num_cached = ask(cache, prompt)
        assert num_cached < length
        assert cache.num_bytes <= num_blocks * 100
        assert cache.num_blocks == count_blocks(cache)
        assert len(cache._leaves) <= 2 * cache.num_blocks + 2
        if num_blocks:
            first_block = prompt[:BLOCK_TOKENS]
            assert length <= BLOCK_TOKENS or cache._age or cache.match([*first_block, 0])


def count_blocks(cache: PrefixCache[list[int]]) -> int:
    blocks = list(cache._root.children.values())
    for block in blocks:
        blocks.extend(block.children.values())
    return len(blocks)
