"""A part of the vocabulary gives the tokens of the whole tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_stores import MODEL, fill_store
from test_tokenizer import TEXTS
from tokenizers import AddedToken, Tokenizer
from typer.testing import CliRunner

from smolcli.cli.main import app
from smolcli.text.detokenizer import TextDecoder
from smolcli.text.vocabulary_index import (
    IndexedTokenizer,
    build_index,
    longest_token,
    open_indexed,
    write_index,
)

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
texts = st.one_of(st.text(max_size=40), st.sampled_from([*TEXTS, *CONTROL]))


@pytest.fixture(scope="module")
def source(tiny_folder: Path) -> bytes:
    return (tiny_folder / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def whole(source: bytes) -> Tokenizer:
    return Tokenizer.from_str(source.decode())


def indexed(source: bytes) -> IndexedTokenizer:
    index = build_index(json.loads(source))
    assert index is not None
    return IndexedTokenizer(index, source)


def assert_equal(part: IndexedTokenizer, whole: Tokenizer, text: str) -> None:
    """Control tokens count, or are ordinary text, as in user messages."""
    for is_text in (False, True):
        part.encode_special_tokens = whole.encode_special_tokens = is_text
        ids = part.encode(text, add_special_tokens=False).ids
        assert ids == whole.encode(text, add_special_tokens=False).ids
        assert part.decode(ids, skip_special_tokens=False) == text
        assert part.decode(ids) == whole.decode(ids)


@given(sections=st.lists(texts, max_size=4))
def test_a_part_gives_the_same_tokens(source: bytes, whole: Tokenizer, sections: list[str]) -> None:
    assert_equal(indexed(source), whole, "".join(sections))


@pytest.mark.model
def test_a_part_gives_the_same_tokens_on_the_real_model(model_folder: Path) -> None:
    real = (model_folder / "tokenizer.json").read_bytes()
    index = build_index(json.loads(real))
    assert index is not None
    whole = Tokenizer.from_str(real.decode())
    long_tokens = "=" * 200 + " " * 70 + "/" * 90
    for text in [*TEXTS, long_tokens]:
        assert_equal(IndexedTokenizer(index, real), whole, text)


def test_long_and_many_texts_load_the_whole_tokenizer(source: bytes, whole: Tokenizer) -> None:
    """Ids of tokens that were added stay the same."""
    part, alias = indexed(source), "\U00100000"
    part.add_tokens([AddedToken(alias)])
    for text in ["a b", "x" * 5000, *"abcdefgh"]:
        expected = whole.encode(text, add_special_tokens=False).ids
        ids = part.encode(alias + text + alias, add_special_tokens=False).ids
        assert ids == [part.token_to_id(alias), *expected, part.token_to_id(alias)]


@given(token_ids=st.lists(st.integers(0, 400), max_size=40))
def test_decoding_equals_the_whole_tokenizers(
    source: bytes, whole: Tokenizer, token_ids: list[int]
) -> None:
    """Up to 383 there are tokens; most are single bytes, so most sequences are invalid UTF-8."""
    part = indexed(source)
    assert part.decode(token_ids) == whole.decode(token_ids)
    pieces = [
        [decoder.push(token_id) for token_id in token_ids] + [decoder.flush()]
        for decoder in (TextDecoder(part), TextDecoder(whole))
    ]
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}},
        {"decoder": None},
        {"model": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tokenizers_that_change_the_text_have_no_index(
    source: bytes, change: dict[str, Any]
) -> None:
    assert build_index(json.loads(source) | change) is None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": ""}},
        {"model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {}}},
        {"added_tokens": [{"content": "<pad>", "lstrip": True, "rstrip": False}]},
        {"added_tokens": None},
    ],
)
def test_tokens_that_stand_for_any_amount_of_text_have_no_longest_one(
    source: bytes, change: dict[str, Any]
) -> None:
    assert longest_token(json.loads(source)) is not None
    assert longest_token(json.loads(source) | change) is None


def test_index_is_stored_repaired_and_removed(home: Path, tiny_folder: Path, source: bytes) -> None:
    fill_store(home, tiny_folder)
    assert open_indexed(source, min_bytes=0) is None
    write_index(source, min_bytes=0)
    (stored,) = (home / "tokenizers").iterdir()
    opened = open_indexed(source, min_bytes=0)
    assert opened is not None
    whole = Tokenizer.from_str(source.decode())
    assert_equal(opened, whole, "What is gravity?")

    damaged = bytearray(stored.read_bytes())
    damaged[-1] ^= 1
    stored.write_bytes(damaged)
    assert open_indexed(source, min_bytes=0) is None
    write_index(source, min_bytes=0)
    assert open_indexed(source, min_bytes=0) is not None
    assert CliRunner().invoke(app, ["models", "rm", MODEL]).exit_code == 0
    assert not stored.exists()
