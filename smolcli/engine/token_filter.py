"""Which tokens the sampling settings of an answer exclude, besides its grammar."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from smolcli.errors import QueryError
from smolcli.types import Sampling

Bits = np.ndarray[Any, np.dtype[np.uint8]]


class TokenFilter:
    """Combines the tokens that an answer may contain into one mask per step.

    Args:
        sampling: `allowed_token_ids`, `min_tokens`, and the tokens that end the answer.
        bad_words: sequences of token ids that must not occur in the answer.
        vocab_size: the model's.
        eos_ids: the model's end tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        bad_words: Iterable[tuple[int, ...]],
        vocab_size: int,
        eos_ids: frozenset[int],
    ) -> None:
        self._min_tokens = sampling.min_tokens
        self._end_ids = list(eos_ids.union(sampling.stop_token_ids))
        allowed = np.ones(vocab_size, np.bool_)
        if sampling.allowed_token_ids:
            allowed[:] = False
            allowed[list(sampling.allowed_token_ids)] = True
        # Words of several tokens by their last token but one, which is the newest token so far.
        self._words: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        for word in bad_words:
            if len(word) == 1:
                allowed[word[0]] = False
            else:
                self._words[word[-2]].append(word)
        num_bytes = -(-vocab_size // 32) * 4  # whole words of 32 bits
        bits = np.packbits(allowed, bitorder="little")
        self._allowed: Bits = np.pad(bits, (0, num_bytes - len(bits)))

    def mask(self, token_ids: Sequence[int], num_output: int, grammar: bytes | None) -> bytes:
        """The tokens that may come next, see `sequence.Constraint.mask`.

        Args:
            token_ids: the prompt and the answer so far.
            num_output: number of tokens in the answer so far.
            grammar: the tokens that the grammar allows; None allows all.

        Raises:
            QueryError: no token is left.
        """
        bits = self._allowed.copy()
        if grammar is not None:
            bits &= np.frombuffer(grammar, np.uint8)[: len(bits)]  # it may be longer by a word
        _clear(bits, self._completing_bad_words(token_ids, num_output))
        if not bits.any():
            raise QueryError(
                "no token is allowed next: allowed_token_ids, bad_words and the answer's format "
                "contradict each other"
            )
        if num_output < self._min_tokens:
            longer = bits.copy()
            _clear(longer, self._end_ids)
            if longer.any():  # otherwise the answer cannot go on
                bits = longer
        return bits.tobytes()

    def _completing_bad_words(self, token_ids: Sequence[int], num_output: int) -> list[int]:
        """The tokens that would complete a bad word within the answer."""
        if not num_output:
            return []
        words = self._words.get(token_ids[-1], ())
        return [
            word[-1]
            for word in words
            if len(word) - 1 <= num_output and tuple(token_ids[1 - len(word) :]) == word[:-1]
        ]


def token_filter(
    sampling: Sampling,
    bad_words: tuple[tuple[int, ...], ...],
    vocab_size: int,
    eos_ids: frozenset[int],
) -> TokenFilter | None:
    """The filter of one answer; None if its settings exclude no token.

    Args:
        sampling: how tokens are sampled.
        bad_words: sequences of token ids that must not occur in the answer.
        vocab_size: the model's.
        eos_ids: the model's end tokens.

    Raises:
        QueryError: a setting contains a token id that the model does not have.
    """
    _check_ids("logit_bias", (token_id for token_id, _ in sampling.logit_bias), vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    for word in bad_words:
        _check_ids("bad_words", word, vocab_size)
    if not (sampling.min_tokens or sampling.allowed_token_ids or bad_words):
        return None
    return TokenFilter(sampling, bad_words, vocab_size, eos_ids)


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise QueryError(
                f"{field} contains token id {token_id}, but the model's vocabulary has "
                f"{vocab_size} tokens, from 0 to {vocab_size - 1}",
                field=field,
            )


def _clear(bits: Bits, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        bits[token_id >> 3] &= ~(1 << (token_id & 7)) & 0xFF
