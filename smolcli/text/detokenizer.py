"""Incremental detokenization: token ids to streamed text, stop strings and log probabilities."""

from collections.abc import Callable, Iterable
from typing import Any

from smolcli.engine.sequence import TokenLogprob
from smolcli.text.tokenizer import TextDecoder
from smolcli.types import ErrorCode, Query, Result, failure

LOGPROB_DIGITS = 4  # after the decimal point; further digits are not batch-invariant on a GPU


class Detokenizer:
    """Turns the tokens of one answer into text, ending at the first stop string.

    The text excludes the stop string and surrounding white space.

    Args:
        decoder: a new decoder.
        stop: strings that end the answer.
    """

    def __init__(self, decoder: TextDecoder, stop: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._stop = stop
        self._text = ""
        self._num_shown = 0
        self.is_stopped = False

    @property
    def text(self) -> str:
        """The text so far, stripped."""
        return self._text.strip()

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that has become final."""
        return self._extend(self._decoder.push(token_id))

    def finish(self) -> str:
        """End the answer; returns the rest of the text."""
        piece = "" if self.is_stopped else self._extend(self._decoder.flush())
        return piece + self._show(len(self._text))

    def _extend(self, piece: str) -> str:
        searched = max(len(self._text) - max(map(len, self._stop), default=0), 0)
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, searched)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.is_stopped = True
        return self._show(len(self._text) - self._held_length())

    def _held_length(self) -> int:
        """The length of the longest suffix that may be the start of a stop string."""
        if self.is_stopped:
            return 0
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._ends(stop[:n]))
        return max(lengths, default=0)

    def _ends(self, prefix: str) -> bool:
        return self._text.endswith(prefix)

    def _show(self, num_final: int) -> str:
        """Return new final text; trailing white space is held back because more text may follow."""
        final = self._text[:num_final].strip()
        piece = final[self._num_shown :]
        self._num_shown = len(final)
        return piece


def logprob_entries(
    scores: Iterable[TokenLogprob], token_bytes: Callable[[int], bytes]
) -> list[dict[str, Any]]:
    """The log probabilities of an answer's tokens in OpenAI's format, one entry per token.

    Args:
        scores: one per token.
        token_bytes: maps a token id to the bytes it stands for.
    """

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": round(logprob, LOGPROB_DIGITS) + 0.0, "bytes": list(raw)}

    return [
        entry(score.token_id, score.logprob)
        | {"top_logprobs": [entry(*likely) for likely in score.alternatives]}
        for score in scores
    ]


def incomplete_json(query: Query, num_tokens: int) -> Result:
    """The error result of a query whose answer ended before it matched its format.

    Args:
        query: the query.
        num_tokens: length of the answer.
    """
    message = (
        f"the answer was cut off after {num_tokens:,} tokens, before its JSON was complete; "
        "increase max_new_tokens, shorten the prompt or add limits to the schema"
    )
    return failure(query, message, ErrorCode.INCOMPLETE_JSON)
