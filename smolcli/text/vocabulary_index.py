"""A tokenizer that starts fast, because it loads only the tokens that a text can contain.

`tokenizers` needs longer to build the tables of a large vocabulary than smol needs to answer a
short question. Byte-level BPE only ever joins neighbors in the text, so every token that it
considers is a substring of the text. A tokenizer with just these tokens, and the merges that make
them in their order, gives the same ids. An index, written once per tokenizer.json under
SMOL_HOME/tokenizers, finds them. The whole tokenizer is loaded once it pays off: for long texts,
and after a few short ones.
"""

import hashlib
import json
import re
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from smolcli.atomic import write_atomically
from smolcli.settings import smol_home

if TYPE_CHECKING:  # NumPy is imported late: checking a file and remote models need none
    import numpy as np

FORMAT = 2  # of an index
MIN_BYTES = 256 << 10  # a smaller tokenizer.json loads as fast as its index
MAX_PARTS = 4  # texts that are encoded with a part of the vocabulary before the whole is loaded
MAX_CHARS = 4000  # of such a text
SHORT_BYTES = 16  # of tokens that are looked up in the text's substrings; few are longer
FIRST_EXTRA_ID = 1 << 30  # ids of tokens that `add_tokens` adds; no vocabulary is that large
SPLITTING = {"Sequence", "Digits", "Split", "ByteLevel"}  # pre-tokenizers that only cut the text


class Encoded(NamedTuple):
    """The ids of a text, as `tokenizers.Encoding` has them."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class VocabularyIndex:
    """The tokens and merges of a byte-level BPE tokenizer.

    Args:
        skeleton: tokenizer.json without vocabulary, merges and added tokens.
        added: added tokens, all of them special, as in tokenizer.json.
        tokens: UTF-8, in the order of their ids.
        merges: (3, num_merges) int32: the ids of left and right side and of their union, most
            important first.
        long_ids: tokens of more than SHORT_BYTES bytes.
    """

    skeleton: dict[str, Any]
    added: list[dict[str, Any]]
    long_ids: list[int]
    tokens: list[bytes]
    merges: "np.ndarray[Any, np.dtype[Any]]"


class IndexedTokenizer:
    """Stands in for a `tokenizers.Tokenizer` that adds no tokens of its own to texts.

    Thread-safe once the tokens have been added.

    Args:
        index: the tokenizer's index.
        source: its tokenizer.json.
    """

    model = None  # has no unknown token

    def __init__(self, index: VocabularyIndex, source: bytes) -> None:
        self.encode_special_tokens = False
        self._index = index
        self._source = source
        self._added = {token["id"]: _added_token(token) for token in index.added}
        self._extra: list[AddedToken] = []
        self._decoder = _tokenizer(index.skeleton, {}, []).decoder
        self._num_parts = 0
        self._lock = threading.Lock()

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens of the tokenizer.json by id."""
        return self._added

    def get_vocab_size(self, with_added_tokens: bool) -> int:
        """The number of tokens without added ones."""
        assert not with_added_tokens
        return len(self._index.tokens)

    def add_tokens(self, tokens: Sequence[AddedToken]) -> None:
        """Add tokens, whose ids begin at FIRST_EXTRA_ID."""
        self._extra += tokens

    def token_to_id(self, text: str) -> int | None:
        """The id of a token that was added."""
        ids = {token.content: FIRST_EXTRA_ID + i for i, token in enumerate(self._extra)}
        return ids.get(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Encode a text; the ids are those of the whole tokenizer."""
        is_short = self._num_parts < MAX_PARTS and len(text) <= MAX_CHARS
        if "_whole" in self.__dict__ or add_special_tokens or not is_short:
            with self._lock:
                tokenizer, ids = self._whole
        else:
            self._num_parts += 1
            tokenizer, ids = self._part(text)
        encoded = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return Encoded([ids.get(token_id, token_id) for token_id in encoded])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode ids; ids without a token are skipped."""
        tokens: list[str] = []
        for token_id in token_ids:
            if token_id in self._added:
                tokens += [] if skip_special_tokens else [self._added[token_id].content]
            elif token_id < len(self._index.tokens):
                tokens.append(self._index.tokens[token_id].decode())
        return str(self._decoder.decode(tokens))

    @cached_property
    def _whole(self) -> tuple[Tokenizer, dict[int, int]]:
        tokenizer = Tokenizer.from_str(self._source.decode())
        return tokenizer, self._with_extra(tokenizer)

    def _part(self, text: str) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer for one text, and the ids that its own ids stand for."""
        import numpy as np

        tokens, (left, right, union) = self._index.tokens, self._index.merges
        coded = [_coded(section) for section in self._sections(text)]
        candidates = {part for section in coded for part in _substrings(section)}
        long = [tokens[token_id] for token_id in self._index.long_ids]
        candidates.update(token for section in coded for token in long if token in section)
        candidates.update(char.encode() for char in BYTE_CHARS)
        candidates.update(token.content.encode() for token in self._added.values())
        ids = [i for i, token in enumerate(tokens) if token in candidates]
        is_needed = np.zeros(len(tokens), np.bool_)
        is_needed[ids] = True
        texts = {token_id: tokens[token_id].decode() for token_id in ids}
        ranks = np.flatnonzero(is_needed[union] & is_needed[left] & is_needed[right])
        merges = [
            [texts[a], texts[b]]
            for a, b in zip(left[ranks].tolist(), right[ranks].tolist(), strict=True)
        ]
        vocab = {token: own for own, token in enumerate(texts.values())}
        tokenizer = _tokenizer(self._index.skeleton, vocab, merges)
        tokenizer.add_special_tokens(list(self._added.values()))
        added = {_id(tokenizer, token): i for i, token in self._added.items()}
        return tokenizer, dict(enumerate(ids)) | added | self._with_extra(tokenizer)

    def _sections(self, text: str) -> list[str]:
        """The text between extra tokens, which `tokenizers` cuts out before it does anything."""
        extra = "|".join(re.escape(token.content) for token in self._extra)
        return re.split(extra, text) if extra else [text]

    def _with_extra(self, tokenizer: Tokenizer) -> dict[int, int]:
        """Add the extra tokens to a tokenizer; returns their ids here by their ids there."""
        tokenizer.encode_special_tokens = self.encode_special_tokens
        tokenizer.add_tokens(self._extra)
        return {_id(tokenizer, token): FIRST_EXTRA_ID + i for i, token in enumerate(self._extra)}


def open_indexed(source: bytes, min_bytes: int = MIN_BYTES) -> IndexedTokenizer | None:
    """Open a tokenizer by its index, if it has been written.

    Args:
        source: a tokenizer.json.
        min_bytes: minimum size of a tokenizer.json that has an index.

    Returns:
        None if there is no intact index, or the tokenizer is of a kind that cannot have one.
    """
    if len(source) < min_bytes:
        return None
    try:
        index = _unpack(_path(source).read_bytes())
    except (OSError, ValueError):
        return None
    return None if index is None else IndexedTokenizer(index, source)


def write_index(source: bytes, min_bytes: int = MIN_BYTES) -> None:
    """Write the index of a valid tokenizer.json, unless it is small or the store is read-only.

    Args:
        source: the tokenizer.json.
        min_bytes: its minimum size.
    """
    path = _path(source)
    if len(source) < min_bytes:
        return
    with suppress(OSError, ValueError):
        _unpack(path.read_bytes())
        return  # written before, perhaps to say that there is no index
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _pack(build_index(json.loads(source))))


def remove_index(folder: Path) -> None:
    """Delete the index of a model directory's tokenizer.json, if there is one."""
    with suppress(OSError):
        _path((folder / "tokenizer.json").read_bytes()).unlink()


def build_index(values: Mapping[str, Any]) -> VocabularyIndex | None:
    """Index a tokenizer.

    Args:
        values: a valid tokenizer.json.

    Returns:
        None if its tokens are not always substrings of the text, or not numbered from 0.
    """
    try:
        return _index(values)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None  # in a form that `tokenizers` reads, but nobody writes any more


def _index(values: Mapping[str, Any]) -> VocabularyIndex | None:
    import numpy as np

    model, added = values["model"], values["added_tokens"]
    if not (_is_byte_level(values) and all(map(_is_plain_special, added))):
        return None
    vocab: dict[str, int] = model["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))) or "\n" in "".join(tokens):
        return None
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = [(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs]
    left_out: dict[str, Any] = {"vocab": {}, "merges": []}
    skeleton = dict(values) | {"model": model | left_out, "added_tokens": []}
    return VocabularyIndex(
        skeleton | {"post_processor": None},
        added,
        [token_id for token_id, token in enumerate(tokens) if len(token.encode()) > SHORT_BYTES],
        [token.encode() for token in tokens],
        np.array(merges, "<i4").reshape(-1, 3).T,
    )


def longest_token(values: Mapping[str, Any]) -> int | None:
    """The number of bytes that a token represents at most.

    Args:
        values: a valid tokenizer.json.

    Returns:
        None if there is no such limit: tokens of other kinds than byte-level BPE may also represent
        text that a normalizer removes, or any amount of white space or unknown text.
    """
    try:
        model, added = values["model"], values["added_tokens"]
        takes_space = any(token["lstrip"] or token["rstrip"] for token in added)
        if takes_space or not _is_byte_level(values):
            return None
        # A character of the vocabulary is a byte of the text, but one of an added token is not.
        lengths = [*map(len, model["vocab"]), *(len(t["content"].encode()) for t in added)]
        return max(lengths)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None  # see `build_index`


def _is_byte_level(values: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is byte-level BPE that adds nothing to the text before it splits it."""
    model = values["model"]
    steps = _steps(values["pre_tokenizer"])
    types = [step["type"] for step in steps]
    unwanted = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in (*unwanted, "byte_fallback"))
        and not any(values.get(name) for name in ("normalizer", "truncation", "padding"))
        and types.count("ByteLevel") == 1
        and not any(step.get("add_prefix_space") for step in steps)
        and set(types) <= SPLITTING
        and (values["decoder"] or {}).get("type") == "ByteLevel"
    )


def _is_plain_special(added_token: Mapping[str, Any]) -> bool:
    """Whether a token is a control token that is recognized wherever it is written."""
    return bool(added_token["special"]) and not added_token["single_word"]


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """A pre-tokenizer and those that it consists of."""
    if not pre_tokenizer:
        return []
    inner = pre_tokenizer.get("pretokenizers", [])
    return [pre_tokenizer, *(step for each in inner for step in _steps(each))]


def _path(source: bytes) -> Path:
    digest = hashlib.sha256(source).hexdigest()
    return smol_home() / "tokenizers" / f"{digest[:32]}.{FORMAT}"


def _pack(index: VocabularyIndex | None) -> bytes:
    """An index as a file: a checksum, the lengths and texts of the parts, and the merges."""
    import numpy as np

    if index is None:
        head, tokens, merges = b"null", b"", b""
    else:
        head = json.dumps([index.skeleton, index.added, index.long_ids]).encode()
        tokens, merges = b"\n".join(index.tokens), index.merges.astype("<i4").tobytes()
    body = np.array([len(head), len(tokens)], "<i4").tobytes() + head + tokens + merges
    return zlib.crc32(body).to_bytes(4, "little") + body


def _unpack(packed: bytes) -> VocabularyIndex | None:
    """The index in a file; None if the tokenizer cannot have one.

    Raises:
        ValueError: the file is damaged.
    """
    import numpy as np

    if zlib.crc32(memoryview(packed)[4:]).to_bytes(4, "little") != packed[:4]:
        raise ValueError("the checksum is wrong")
    head_bytes, tokens_bytes = np.frombuffer(packed, "<i4", 2, 4).tolist()
    tokens_start = 12 + head_bytes
    head = json.loads(packed[12:tokens_start])
    if head is None:
        return None
    merges_start = tokens_start + tokens_bytes
    merges = np.frombuffer(packed[merges_start:], "<i4").reshape(3, -1)
    skeleton, added, long_ids = head
    tokens = packed[tokens_start:merges_start].split(b"\n")
    return VocabularyIndex(skeleton, added, long_ids, tokens, merges)


def _tokenizer(skeleton: dict[str, Any], vocab: dict[str, int], merges: list[Any]) -> Tokenizer:
    model = skeleton["model"] | {"vocab": vocab, "merges": merges}
    return Tokenizer.from_str(json.dumps(skeleton | {"model": model}))


def _id(tokenizer: Tokenizer, token: AddedToken) -> int:
    token_id = tokenizer.token_to_id(token.content)
    assert token_id is not None
    return token_id


def _added_token(values: Mapping[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(values["content"], **{flag: values[flag] for flag in flags})


def _byte_chars() -> str:
    """The character by which byte-level BPE represents each byte (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # as themselves
    hidden = [byte for byte in range(256) if byte not in shown]
    chars = {byte: chr(byte) for byte in shown}
    chars |= {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}
    return "".join(chars[byte] for byte in range(256))


BYTE_CHARS = _byte_chars()


def _coded(text: str) -> bytes:
    """A text as the tokens of byte-level BPE represent it, in UTF-8."""
    return text.encode().decode("latin-1").translate(BYTE_CHARS).encode()


def _substrings(coded: bytes) -> set[bytes]:
    """All substrings of at most SHORT_BYTES bytes."""
    return {
        coded[start:end]
        for start in range(len(coded))
        for end in range(start + 1, min(len(coded), start + SHORT_BYTES) + 1)
    }
