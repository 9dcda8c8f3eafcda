"""What a model's tokens spell, and which of them may come next in an answer of some format."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from smolcli.errors import QueryError
from smolcli.types import AnswerFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_MET = 12  # patterns for one text: their time doubles with each, and nothing ends it
_PATTERNS = ("pattern", "format", "$ref")
NUM_COMPILED = 128  # formats that are kept for queries to come
# As json.dumps writes it: white space left to the model may go on for ever.
JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_IN_OTHER_WORDS = {
    "NoExtension": "no text is one",
    "Unable to determine if regex is empty": "its patterns are too hard",
    "lexer error": "its patterns are too hard",
    "oneOf constraints": "oneOf is not supported, but anyOf is",
}


class GrammarCompiler:
    """The tokens of one model, by llguidance; safe to use from any thread.

    Args:
        tokenizer_json: gives the tokenizer; called when it is needed first.
        vocab_size: of the model.
        eos_ids: tokens that end an answer.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab_size: int, eos_ids: frozenset[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._loaded: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled = lru_cache(NUM_COMPILED)(self._compile)

    def speller(self) -> Callable[[int], bytes]:
        """Gives the bytes of a token, which need not be whole characters."""
        tokenizer = self._tokenizer()
        return lambda token_id: tokenizer.decode_bytes([token_id])

    def constraint(self, answers: AnswerFormat) -> "GrammarMatcher":
        """What holds one answer to its format; equal formats are compiled once.

        Raises:
            QueryError: saying what cannot be done.
        """
        return GrammarMatcher(self._compiled(answers).deep_copy(), answers)

    def _tokenizer(self) -> "LLTokenizer":
        """Read when it is needed first, which takes a moment."""
        with self._lock:
            if self._loaded is None:
                from llguidance import LLTokenizer

                self._loaded = LLTokenizer(
                    self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids
                )
            return self._loaded

    def _compile(self, answers: AnswerFormat) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        with _panics_refused(answers):
            matcher = LLMatcher(self._tokenizer(), grammar(answers), log_level=0, limits=limits)
            matcher.compute_bitmask()  # some faults show only here
        if matcher.is_error():
            raise _refusal(answers, matcher.get_error())
        return matcher


class GrammarMatcher:
    """Holds one answer to its format; see `engine.sequence.Constraint`."""

    def __init__(self, matcher: "LLMatcher", answers: AnswerFormat) -> None:
        self._matcher = matcher
        self._answers = answers

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come."""
        return self._matcher.is_stopped()

    @property
    def fault(self) -> QueryError | None:
        """Why the answer cannot be held to its format any more; None while it can."""
        is_error = self._matcher.is_error()
        return _refusal(self._answers, self._matcher.get_error()) if is_error else None

    def mask(self) -> bytes:
        """One bit for each token, from the lowest of the first byte on: 1 where it is allowed."""
        return self._matcher.compute_bitmask()

    def accept(self, token_id: int) -> None:
        """Take the next token, which the mask allows."""
        self._matcher.consume_token(token_id)


def grammar(answers: AnswerFormat) -> str:
    """A format in llguidance's words."""
    from llguidance import LLMatcher

    if answers.choices:
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, answers.choices)))
    _refuse_hard(answers)
    return LLMatcher.grammar_from_json_schema(answers.schema, overrides=JSON_STYLE)


def _refuse_hard(answers: AnswerFormat) -> None:
    """Refuse what llguidance would work on without end, or let change what JSON is."""
    num_met = 0
    for node in _nodes(json.loads(answers.schema or "{}")):
        if "x-guidance" in node:
            raise _refusal(answers, "x-guidance is not supported")
        num_met += _num_met(node)
    if num_met > MOST_MET:
        raise _refusal(answers, f"more than {MOST_MET} patterns have to hold together")


def _num_met(node: dict[str, Any]) -> int:
    """How many patterns have to hold together here; one alone does not count."""
    parts = node.get("allOf")
    found = [node, *(inner for part in _items(parts) for inner in _combined(part))]
    num = sum(isinstance(schema.get(name), str) for schema in found for name in _PATTERNS)
    return num if num > 1 else 0


def _combined(value: object) -> Iterator[dict[str, Any]]:
    """A schema, and those that it is combined of in its place."""
    left = [value]
    while left:
        if isinstance(node := left.pop(), dict):
            yield node
            for name in ("allOf", "anyOf", "oneOf"):
                left.extend(_items(node.get(name)))


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _nodes(value: object) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    left = [value]
    while left:
        match left.pop():
            case dict() as node:
                yield node
                left.extend(node.values())
            case list() as items:
                left.extend(items)


def check_format(answers: AnswerFormat) -> None:
    """Check, without a model, that answers can be held to a format.

    Raises:
        QueryError: saying what cannot be done.
    """
    from llguidance import LLMatcher

    with _panics_refused(answers):
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar(answers))
    if is_error:
        raise _refusal(answers, messages[0])


@contextmanager
def _panics_refused(answers: AnswerFormat) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":  # pyo3's, which is no Exception
            raise
        raise _refusal(answers, f"llguidance failed: {exc}") from exc


def _refusal(answers: AnswerFormat, reason: str) -> QueryError:
    field = "choices" if answers.choices else "response_format"
    what = "these choices" if answers.choices else "this schema"
    return QueryError(f"answers cannot be held to {what}: {_one_line(reason)}", field=field)


def _one_line(text: str) -> str:
    """What llguidance says; where that means nothing to people, what it means."""
    known = (reason for says, reason in _IN_OTHER_WORDS.items() if text.startswith(says))
    return next(known, " ".join(text.split())[:300])
