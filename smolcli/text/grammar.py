"""Constrained decoding: grammars that restrict which token may come next, by llguidance."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from smolcli.errors import QueryError
from smolcli.text.json_schema import rewrite_schema
from smolcli.types import AnswerFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMBINED_PATTERNS = 12  # llguidance's time doubles with each, and it has no timeout
_PATTERN_KEYWORDS = ("pattern", "format", "$ref")
MAX_CACHED_GRAMMARS = 128
# The layout of json.dumps: a model that chooses its own white space may never stop.
JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_EXPLANATIONS = {
    "NoExtension": "no text can match it",
    "Unable to determine if regex is empty": "its patterns are too complex",
    "lexer error": "its patterns are too complex",
    "oneOf constraints": "oneOf is not supported; use anyOf",
}


class GrammarCompiler:
    """Compiles answer formats to grammars over the tokens of one model; thread-safe.

    Args:
        tokenizer_json: returns the tokenizer as JSON; called on first use.
        vocab_size: the model's.
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
        self._compiled = lru_cache(MAX_CACHED_GRAMMARS)(self._compile)

    def token_bytes(self) -> Callable[[int], bytes]:
        """A function from a token id to its bytes, which may be part of a character."""
        tokenizer = self._tokenizer()
        return lambda token_id: tokenizer.decode_bytes([token_id])

    def matcher(self, answers: AnswerFormat) -> "GrammarMatcher":
        """A new matcher for one answer; each distinct format is compiled once.

        Raises:
            QueryError: the format is not supported.
        """
        return GrammarMatcher(self._compiled(answers).deep_copy(), answers)

    def _tokenizer(self) -> "LLTokenizer":
        """Load the tokenizer on first use: it takes a while."""
        with self._lock:
            if self._loaded is None:
                from llguidance import LLTokenizer

                self._loaded = LLTokenizer(
                    self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids
                )
            return self._loaded

    def _compile(self, answers: AnswerFormat) -> "LLMatcher":
        return _compile(answers, self._tokenizer())


class GrammarMatcher:
    """The state of one answer in its grammar; implements `engine.sequence.Constraint`."""

    def __init__(self, matcher: "LLMatcher", answers: AnswerFormat) -> None:
        self._matcher = matcher
        self._answers = answers

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def is_over(self) -> bool:
        """Whether no further token is possible."""
        return self._matcher.is_stopped()

    @property
    def fault(self) -> QueryError | None:
        """Why matching failed, or None."""
        is_error = self._matcher.is_error()
        return _unsupported(self._answers, self._matcher.get_error()) if is_error else None

    def mask(self) -> bytes:
        """A bit mask over the vocabulary, least significant bit first; 1 means allowed."""
        return self._matcher.compute_bitmask()

    def accept(self, token_id: int) -> None:
        """Advance by one token, which must be allowed by the mask."""
        self._matcher.consume_token(token_id)


def to_grammar(answers: AnswerFormat) -> str:
    """Translate an answer format to llguidance's grammar language."""
    from llguidance import LLMatcher

    if answers.choices:
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, answers.choices)))
    _reject_unsafe(answers)
    schema = json.dumps(rewrite_schema(json.loads(answers.schema)), ensure_ascii=False)
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)


def _reject_unsafe(answers: AnswerFormat) -> None:
    """Reject schemas that llguidance would compile forever, and its extensions to JSON Schema."""
    num_patterns = 0
    for node in _nodes(json.loads(answers.schema or "{}")):
        if "x-guidance" in node:
            raise _unsupported(answers, "x-guidance is not supported")
        num_patterns += _num_patterns(node)
    if num_patterns > MAX_COMBINED_PATTERNS:
        raise _unsupported(answers, f"it combines more than {MAX_COMBINED_PATTERNS} patterns")


def _num_patterns(node: dict[str, Any]) -> int:
    """How many patterns a string has to match at this node; a single one counts as 0."""
    parts = node.get("allOf")
    found = [node, *(inner for part in _items(parts) for inner in _combined(part))]
    num = sum(isinstance(schema.get(name), str) for schema in found for name in _PATTERN_KEYWORDS)
    return num if num > 1 else 0


def _combined(value: object) -> Iterator[dict[str, Any]]:
    """A schema and the schemas that it is composed of by allOf, anyOf and oneOf."""
    pending = [value]
    while pending:
        if isinstance(node := pending.pop(), dict):
            yield node
            for name in ("allOf", "anyOf", "oneOf"):
                pending.extend(_items(node.get(name)))


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _nodes(value: object) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value, at any depth."""
    pending = [value]
    while pending:
        match pending.pop():
            case dict() as node:
                yield node
                pending.extend(node.values())
            case list() as items:
                pending.extend(items)


def check_format(answers: AnswerFormat) -> None:
    """Check, without a model, that an answer format is supported.

    The grammar is compiled as for an answer, with bytes as tokens: validating it alone misses
    schemas that no text matches.

    Raises:
        QueryError: it is not.
    """
    _compile(answers, _byte_tokenizer())


@lru_cache(1)
def _byte_tokenizer() -> "LLTokenizer":
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _compile(answers: AnswerFormat, tokenizer: "LLTokenizer") -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    with _panics_as_query_errors(answers):
        matcher = LLMatcher(tokenizer, to_grammar(answers), log_level=0, limits=limits)
        matcher.compute_bitmask()  # some errors are reported only here
    if matcher.is_error():
        raise _unsupported(answers, matcher.get_error())
    return matcher


@contextmanager
def _panics_as_query_errors(answers: AnswerFormat) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":  # raised by pyo3; not a subclass of Exception
            raise
        raise _unsupported(answers, f"llguidance failed: {exc}") from exc


def _unsupported(answers: AnswerFormat, reason: str) -> QueryError:
    field = "choices" if answers.choices else "response_format"
    what = "choices" if answers.choices else "schema"
    return QueryError(f"unsupported {what}: {_explain(reason)}", field=field)


def _explain(text: str) -> str:
    """llguidance's message on one line, or a clearer explanation if we have one."""
    known = (reason for prefix, reason in _EXPLANATIONS.items() if text.startswith(prefix))
    return next(known, " ".join(text.split())[:300])
