"""Constrained decoding: grammars that restrict which token may come next, by llguidance."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from smolcli.errors import QueryError
from smolcli.text.json_schema import close_objects, rewrite_schema
from smolcli.text.tool_calls import ARGUMENTS, END, LIST, MARKER, NAME, CallSyntax
from smolcli.types import AnswerFormat, Function, ToolMode, Tools

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

MAX_COMBINED_PATTERNS = 12  # llguidance's time doubles with each, and it has no timeout
_PATTERN_KEYWORDS = ("pattern", "format", "$ref")
MAX_CACHED_GRAMMARS = 128
MAX_GRAMMAR_CHARS = 50_000
LONG_GRAMMAR = 1000  # characters; the rules of shorter ones cannot overflow a stack
STACK_BYTES = 256 << 20  # for a chain of 65,000 rules, which is llguidance's limit
_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?![*/])(?:\\.|[^/\\\n])*/|(?://|#)[^\n]*')
MAX_CALLS = 8  # in one answer
NO_ARGUMENTS = '{"type": "object", "properties": {}, "additionalProperties": false}'
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
    "panic: assertion failed: grammar.symbols.len()": "it is too large",
}
_stack_lock = threading.Lock()


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

    def matcher(self, spec: "GrammarSpec") -> "GrammarMatcher":
        """A new matcher for one answer; each distinct spec is compiled once.

        Raises:
            QueryError: the spec is not supported.
        """
        return GrammarMatcher(self._compiled(spec).deep_copy(), spec)

    def _tokenizer(self) -> "LLTokenizer":
        """Load the tokenizer on first use: it takes a while."""
        with self._lock:
            if self._loaded is None:
                from llguidance import LLTokenizer

                self._loaded = LLTokenizer(
                    self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids
                )
            return self._loaded

    def _compile(self, spec: "GrammarSpec") -> "LLMatcher":
        return _compile(spec, self._tokenizer())


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the grammar of an answer is compiled from.

    Args:
        format: format of the answer's text; None allows any text.
        tools: functions that the answer may call.
        syntax: how the model writes calls.
    """

    format: AnswerFormat | None = None
    tools: Tools | None = None
    syntax: CallSyntax = LIST

    @property
    def is_free(self) -> bool:
        """Whether it is any text."""
        return self.format is None and self.callable_tools is None

    @property
    def callable_tools(self) -> Tools | None:
        """The tools, if any may be called."""
        return self.tools if self.tools and self.tools.mode is not ToolMode.NONE else None


class GrammarMatcher:
    """The state of one answer in its grammar; implements `engine.sequence.Constraint`."""

    def __init__(self, matcher: "LLMatcher", spec: GrammarSpec) -> None:
        self._matcher = matcher
        self._spec = spec

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def is_over(self) -> bool:
        """Whether no further token is possible."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> QueryError | None:
        """Why matching failed, or None."""
        is_error = self._matcher.is_error()
        return _unsupported(self._spec, self._matcher.get_error()) if is_error else None

    def mask(self) -> bytes:
        """A bit mask over the vocabulary, least significant bit first; 1 means allowed."""
        return self._matcher.compute_bitmask()

    def accept(self, token_id: int) -> None:
        """Advance by one token, which must be allowed by the mask."""
        self._matcher.consume_token(token_id)


def to_grammar(spec: GrammarSpec) -> str:
    """Translate a spec to llguidance's grammar language."""
    from llguidance import LLMatcher

    if spec.callable_tools is not None:
        return LLMatcher.grammar_from_lark(_tools_grammar(spec, spec.callable_tools))
    assert spec.format is not None
    if spec.format.choices:
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, spec.format.choices)))
    if spec.format.regex:
        return LLMatcher.grammar_from_regex(spec.format.regex)
    if spec.format.grammar:
        return LLMatcher.grammar_from_lark(_to_lark(spec.format.grammar))
    schema = _rewritten(spec.format.schema)
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)


def _to_lark(grammar: str) -> str:
    """A grammar in Lark's language, translated from GBNF if it is in that.

    Raises:
        QueryError: it cannot be read, or uses what could take unbounded time to compile.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise _unsupported_grammar(f"it is longer than {MAX_GRAMMAR_CHARS:,} characters")
    bare = _LITERALS.sub("", grammar)
    if "::=" in bare:
        try:
            return str(gbnf_to_lark(grammar))
        except RecursionError as exc:
            raise _unsupported_grammar("it is nested too deeply") from exc
        except IndexError as exc:
            raise _unsupported_grammar("Unexpected end of input") from exc
        except Exception as exc:  # for rules that do not exist, the library raises no narrower type
            raise _unsupported_grammar(str(exc)) from exc
    if found := re.search(r"&|%(?!ignore\b|import\b)\w*", bare):
        raise _unsupported_grammar(f"{found[0]!r} is not supported")
    return grammar


def _unsupported_grammar(reason: str) -> QueryError:
    return QueryError(f"unsupported grammar: {_explain(reason)}", field="structured_outputs")


def _rewritten(schema: str) -> str:
    return json.dumps(rewrite_schema(json.loads(schema)), ensure_ascii=False)


def _tools_grammar(spec: GrammarSpec, tools: Tools) -> str:
    """A grammar in llguidance's dialect of Lark: text, or calls, which MARKER begins.

    Text may precede calls. It never contains MARKER, so a model that writes MARKER has to go on
    with a call.
    """
    syntax = spec.syntax
    names = [function.name for function in callable_functions(tools)]
    more = f" ({_quoted(syntax.separator)} call){{0,{MAX_CALLS - 1}}}" if tools.is_parallel else ""
    lines = ["%llguidance {}"]
    if tools.mode is ToolMode.REQUIRED:
        lines.append(f"start: {_quoted(MARKER)} calls")
    elif spec.format is None:
        lines += [
            "start: TEXT | before calls",
            f"before[suffix={_quoted(MARKER)}]: /(?s:.*)/",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){MARKER}(?s:.*)/",
        ]
    else:
        lines += [f"start: answer | {_quoted(MARKER)} calls", _answer_rule(spec.format)]
    lines += [
        f"calls: {_quoted(syntax.opening)} call{more} {_quoted(syntax.closing)}",
        f"call: {' | '.join(f'call_{at}' for at in range(len(names)))}",
    ]
    for at, function in enumerate(callable_functions(tools)):
        head = _quoted(f"{NAME}{function.name}{ARGUMENTS}")
        lines += [f"call_{at}: {head} arguments_{at} {_quoted(END)}"]
        lines += [f"arguments_{at}: %json {_styled(_argument_schema(function))}"]
    return "\n".join(lines) + "\n"


def _answer_rule(answers: AnswerFormat) -> str:
    if answers.regex or answers.grammar:
        message = "a regex or a grammar cannot be combined with tools that may be called"
        raise QueryError(message, field="structured_outputs")
    if answers.choices:
        return f"answer: {' | '.join(map(_quoted, answers.choices))}"
    return f"answer: %json {_styled(json.loads(answers.schema))}"


def _styled(schema: dict[str, Any]) -> str:
    """A schema for Lark's %json, which takes options from the schema itself."""
    rewritten = rewrite_schema(schema) | {"x-guidance": JSON_STYLE}
    return json.dumps(rewritten, ensure_ascii=False)


def callable_functions(tools: Tools) -> list[Function]:
    """The functions that an answer may call."""
    return [f for f in tools.functions if not tools.allowed or f.name in tools.allowed]


def _argument_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    schema = json.loads(function.parameters or NO_ARGUMENTS)
    return close_objects({"type": "object"} | schema)


def _quoted(text: str) -> str:
    """A literal in Lark."""
    return json.dumps(text, ensure_ascii=False)


def _reject_unsafe(schema: str, field: str) -> None:
    """Reject schemas that llguidance would compile forever, and its extensions to JSON Schema."""
    num_patterns = 0
    for node in _nodes(json.loads(schema or "{}")):
        if "x-guidance" in node:
            raise _unsupported_schema("x-guidance is not supported", field)
        num_patterns += _num_patterns(node)
    if num_patterns > MAX_COMBINED_PATTERNS:
        reason = f"it combines more than {MAX_COMBINED_PATTERNS} patterns"
        raise _unsupported_schema(reason, field)


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


def check_grammar(spec: GrammarSpec) -> None:
    """Check, without a model, that a grammar is supported.

    The grammar is compiled as for an answer, with bytes as tokens: validating it alone misses
    schemas that no text matches.

    Raises:
        QueryError: it is not.
    """
    _compile(spec, _byte_tokenizer())


def check_format(answers: AnswerFormat) -> None:
    """Check, without a model, that an answer format is supported; see `check_grammar`."""
    check_grammar(GrammarSpec(answers))


@lru_cache(1)
def _byte_tokenizer() -> "LLTokenizer":
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _compile(spec: GrammarSpec, tokenizer: "LLTokenizer") -> "LLMatcher":
    if spec.format is not None:
        _reject_unsafe(spec.format.schema, "response_format")
    if spec.callable_tools is not None:
        _check_parameters(spec.callable_tools)
    matcher = _matcher(spec, tokenizer)
    if matcher.is_error():
        if spec.callable_tools is not None:
            _blame_part(spec, spec.callable_tools, tokenizer)
        raise _unsupported(spec, matcher.get_error())
    return matcher


def _matcher(spec: GrammarSpec, tokenizer: "LLTokenizer") -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    with _panics_as_query_errors(spec):
        grammar = to_grammar(spec)

        def compiled() -> LLMatcher:
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
            matcher.compute_bitmask()  # some errors are reported only here
            return matcher

        return compiled() if len(grammar) <= LONG_GRAMMAR else _on_large_stack(compiled)


def _on_large_stack(function: Callable[[], T]) -> T:
    """Call a function on a new thread with a large stack.

    llguidance recurses from each rule to those that it refers to. A chain of 3,000 rules would
    overflow an ordinary stack and kill the process.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as exc:  # including a Rust panic
            done.set_exception(exc)

    with _stack_lock:
        usual = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="smol-grammar", daemon=True).start()
        finally:
            threading.stack_size(usual)
    return done.result()


def _check_parameters(tools: Tools) -> None:
    for at, function in enumerate(tools.functions):
        path = f"tools[{at}].function.parameters"
        _reject_unsafe(function.parameters, path)
        if _argument_schema(function)["type"] != "object":
            raise QueryError(f'{path}.type must be "object"', field=f"{path}.type")


def _blame_part(spec: GrammarSpec, tools: Tools, tokenizer: "LLTokenizer") -> None:
    """Raise the error of the schema that makes a spec unsupported, if it is a single one."""
    if spec.format is not None:
        _compile(GrammarSpec(spec.format), tokenizer)
    for at, function in enumerate(tools.functions):
        arguments = AnswerFormat(schema=json.dumps(_argument_schema(function)))
        matcher = _matcher(GrammarSpec(arguments), tokenizer)
        if matcher.is_error():
            raise _unsupported_schema(matcher.get_error(), f"tools[{at}].function.parameters")


@contextmanager
def _panics_as_query_errors(spec: GrammarSpec) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":  # raised by pyo3; not a subclass of Exception
            raise
        raise _unsupported(spec, f"llguidance failed: {exc}") from exc


def _unsupported(spec: GrammarSpec, reason: str) -> QueryError:
    if spec.callable_tools is not None:
        return QueryError(f"unsupported tools: {_explain(reason)}", field="tools")
    if spec.format is not None and spec.format.choices:
        return QueryError(f"unsupported choices: {_explain(reason)}", field="choices")
    if spec.format is not None and spec.format.grammar:
        return _unsupported_grammar(reason)
    if spec.format is not None and spec.format.regex:
        found = re.search(r"^error: (.*)$", reason, re.MULTILINE)
        message = f"unsupported regex: {_explain(found[1] if found else reason)}"
        return QueryError(message, field="structured_outputs")
    return _unsupported_schema(reason, "response_format")


def _unsupported_schema(reason: str, field: str) -> QueryError:
    where = "" if field == "response_format" else f"{field}: "
    return QueryError(f"{where}unsupported schema: {_explain(reason)}", field=field)


def _explain(text: str) -> str:
    """llguidance's message on one line, or a clearer explanation if we have one."""
    known = (reason for prefix, reason in _EXPLANATIONS.items() if text.startswith(prefix))
    return next(known, " ".join(text.split())[:300])
