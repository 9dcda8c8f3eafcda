"""Log probabilities of tokens as JSON, in OpenAI's format."""

from collections.abc import Callable, Iterable
from typing import Any

from smolcli.engine.sequence import TokenLogprob

LOGPROB_DIGITS = 4  # after the decimal point; further digits are not batch-invariant on a GPU


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
        return {"token": text, "logprob": _rounded(logprob), "bytes": list(raw)}

    return [
        entry(score.token_id, score.logprob)
        | {"top_logprobs": [entry(*likely) for likely in score.alternatives]}
        for score in scores
    ]


def prompt_logprob_entries(
    prompt_ids: list[int], scores: Iterable[TokenLogprob], token_bytes: Callable[[int], bytes]
) -> list[dict[str, Any]]:
    """The log probabilities of a prompt's tokens, one entry per token, with ids and ranks.

    Args:
        prompt_ids: the prompt.
        scores: one per token after the first, which nothing predicts.
        token_bytes: maps a token id to the bytes it stands for.
    """

    def named(token_id: int) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "token_id": token_id, "bytes": list(raw)}

    def logprob(value: float) -> dict[str, Any]:
        return {"logprob": _rounded(value)}

    first = named(prompt_ids[0]) | {"logprob": None, "rank": None, "top_logprobs": []}
    return [
        first,
        *(
            named(score.token_id)
            | logprob(score.logprob)
            | {"rank": score.rank}
            | {"top_logprobs": [named(i) | logprob(p) for i, p in score.alternatives]}
            for score in scores
        ),
    ]


def _rounded(logprob: float) -> float:
    """A log probability for a record; never -0.0."""
    return round(logprob, LOGPROB_DIGITS) + 0.0
