"""`ChatIds`: exact membership at a bounded number of bytes per id."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from smolcli.batch.chat_ids import ChatIds

MAX_BYTES_PER_ID = 16


@given(st.lists(st.text(max_size=3)))
def test_an_id_can_be_claimed_once(names: list[str]) -> None:
    ids, seen = ChatIds(), set[str]()
    for name in names:
        assert ids.claim(name) == (name not in seen)
        seen.add(name)
    assert len(ids) == len(seen)


def test_ids_survive_the_growth_of_the_table() -> None:
    ids = ChatIds()
    assert all(ids.claim(f"question {n}") for n in range(5_000))
    assert not any(ids.claim(f"question {n}") for n in range(5_000))
    assert ids.claim("question 5000")


def test_an_id_takes_at_most_16_bytes() -> None:
    """A set of 16-byte digests used to take 98 bytes per id."""
    tracemalloc.start()
    try:
        ids = ChatIds()
        for number in range(20_000):
            ids.claim(f"a rather long id, of which only a digest is kept: {number}")
        num_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert num_bytes / len(ids) < MAX_BYTES_PER_ID
