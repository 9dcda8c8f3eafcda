"""Streaming text out of tokens: stop strings, white space, and what they cost."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolcli.text.detokenizer import Detokenizer, StopString, TextDecoder

PIECES = st.lists(st.text(alphabet="ab \n", max_size=5), max_size=12)
STOPS = st.lists(st.text(alphabet="ab \n", min_size=1, max_size=5), max_size=4).map(tuple)


class Pieces:
    """A decoder whose tokens are indices of given pieces of text."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return self._rest


def detokenizer(pieces: list[str], stop: tuple[str, ...], rest: str = "") -> Detokenizer:
    return Detokenizer(cast(TextDecoder, Pieces(pieces, rest)), stop)


def expected_text(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string that is complete, found the slow way."""
    text = ""
    for piece in pieces:
        text += piece
        if found := [start for each in stop if (start := text.find(each)) >= 0]:
            return text[: min(found)].strip(), True
    return text.strip(), False


@given(pieces=PIECES, stop=STOPS, rest=st.sampled_from(["", "\ufffd", "a"]))
def test_text_ends_at_the_first_stop_string(
    pieces: list[str], stop: tuple[str, ...], rest: str
) -> None:
    text = detokenizer(pieces, stop, rest)
    shown = ""
    for token_id in range(len(pieces)):
        shown += text.push(token_id)
        if text.is_stopped:
            break
    shown += text.finish()
    assert (shown, text.is_stopped) == expected_text([*pieces, rest], stop)
    assert text.text == shown


def first_stop(pieces: list[str], stop: tuple[str, ...], min_tokens: int) -> tuple[int, int] | None:
    """Where the first stop string that ends after `min_tokens` tokens begins and ends."""
    text, length = "".join(pieces), 0
    for num_tokens, piece in enumerate(pieces, 1):
        candidates, length = range(length + 1, length + len(piece) + 1), length + len(piece)
        if num_tokens > min_tokens:
            ends = [[i for i in candidates if text[:i].endswith(each)][:1] for each in stop]
            pairs = zip(stop, ends, strict=True)
            found = [(end - len(each), end) for each, first in pairs for end in first]
            if found:
                return min(found)
    return None


@given(pieces=PIECES, stop=STOPS, min_tokens=st.integers(0, 6), includes=st.booleans())
def test_a_stop_string_may_not_end_in_the_first_tokens(
    pieces: list[str], stop: tuple[str, ...], min_tokens: int, includes: bool
) -> None:
    """One that begins there and ends later counts. The text may include it."""
    text = Detokenizer(cast(TextDecoder, Pieces(pieces)), stop, include_stop=includes)
    shown = ""
    for token_id in range(len(pieces)):
        shown += text.push(token_id, may_stop=token_id >= min_tokens)
        if text.is_stopped:
            break
    shown += text.finish()
    span, expected = first_stop(pieces, stop, min_tokens), "".join(pieces)
    if span is not None:
        expected = expected[: span[1] if includes else span[0]]
    assert (shown, text.is_stopped) == (expected.strip(), span is not None)
    assert text.text == shown


@given(pieces=PIECES, stop=STOPS)
def test_shown_text_is_never_taken_back(pieces: list[str], stop: tuple[str, ...]) -> None:
    """Whatever comes next: the rest, the rest of a stop string, or white space."""
    text = detokenizer(pieces, stop)
    shown = ""
    for token_id in range(len(pieces)):
        shown += text.push(token_id)
        if text.is_stopped:
            return
        for each in ("", *stop):
            for cut in range(len(each)):
                end, _ = expected_text([*pieces[: token_id + 1], each[cut:]], stop)
                assert end.startswith(shown)


class CountingString(str):
    """A string that counts how often one of its characters is looked at."""

    num_looks = 0

    def __getitem__(self, index: object) -> str:
        self.num_looks += 1
        return super().__getitem__(index)  # type: ignore[index]


@pytest.mark.parametrize("stop", ["a" * 999 + "b", "ab" * 500, "a" * 500 + "b" + "a" * 499, "b"])
def test_cost_of_a_stop_string_does_not_depend_on_its_length(stop: str) -> None:
    """Each prefix of each stop string was compared for each token: 16 of 1,000 characters cost
    4.9 ms per token, on the thread that computes everybody's answers."""
    counting = CountingString(stop)
    matcher = StopString(counting)
    assert counting.num_looks <= 4 * len(stop)
    counting.num_looks = 0
    for _ in range(500):
        assert matcher.find("aaaa aaaa") is None
    assert counting.num_looks <= 4 * 500 * len("aaaa aaaa")
