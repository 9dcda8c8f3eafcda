"""The text of one answer while its tokens come, and how likely they were."""

from collections.abc import Callable, Iterable
from typing import Any

from smolcli.engine.sequence import TokenLogprob
from smolcli.text.tokenizer import TextDecoder
from smolcli.types import ErrorCode, Query, Result, failure

NUM_DIGITS = 4  # behind the point: further ones depend on what else is in the batch


class Detokenizer:
    """Tokens in, text out: cut before the first stop string, without outer white space.

    Args:
        decoder: of this answer alone.
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
        """All of it, stripped."""
        return self._text.strip()

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that is certain now and was not before."""
        return self._extend(self._decoder.push(token_id))

    def finish(self) -> str:
        """No token follows; returns the rest of the text."""
        piece = "" if self.is_stopped else self._extend(self._decoder.flush())
        return piece + self._show(len(self._text))

    def _extend(self, piece: str) -> str:
        searched = max(len(self._text) - max(map(len, self._stop), default=0), 0)
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, searched)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.is_stopped = True
        return self._show(len(self._text) - self._num_held())

    def _num_held(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        if self.is_stopped:
            return 0
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._ends(stop[:n]))
        return max(lengths, default=0)

    def _ends(self, beginning: str) -> bool:
        return self._text.endswith(beginning)

    def _show(self, num_certain: int) -> str:
        """White space at the end may yet turn out to be outer, so it waits."""
        certain = self._text[:num_certain].strip()
        piece = certain[self._num_shown :]
        self._num_shown = len(certain)
        return piece


def logprob_entries(
    scores: Iterable[TokenLogprob], spell: Callable[[int], bytes]
) -> list[dict[str, Any]]:
    """The likelihoods of an answer's tokens, an entry in OpenAI's shape for each.

    Args:
        scores: of the tokens.
        spell: gives the bytes of a token.
    """

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        spelled = spell(token_id)
        text = spelled.decode(errors="replace")
        return {"token": text, "logprob": round(logprob, NUM_DIGITS) + 0.0, "bytes": list(spelled)}

    return [
        entry(score.token_id, score.logprob)
        | {"top_logprobs": [entry(*likely) for likely in score.alternatives]}
        for score in scores
    ]


def cut_off(query: Query, num_tokens: int) -> Result:
    """The result of a query whose answer ended before it was what its format says."""
    message = (
        f"the answer was cut off after {num_tokens:,} tokens, before it was whole; "
        "more max_new_tokens, a shorter prompt or limits in the schema may help"
    )
    return failure(query, message, ErrorCode.INCOMPLETE_JSON)
