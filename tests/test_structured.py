"""Structured output: schemas, choices, log probabilities and several answers per query."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from smolcli.backends.local import LocalBackend, open_local
from smolcli.errors import QueryError
from smolcli.protocol.answer_formats import JSON_OBJECT, schema_format
from smolcli.settings import EngineSettings
from smolcli.text.grammar import GrammarCompiler, GrammarSpec, check_format
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import AnswerFormat, ErrorCode, FinishReason, Message, Query, Result, Sampling

WAIT_S = 60
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"type": "string", "pattern": "^[a-f]{2,5}$"},
    {"anyOf": [{"type": "boolean"}, {"const": {"x": [1.5, "é日"]}}]},
    {"$defs": {"d": {"enum": [1, 2, 3]}}, "type": "array", "items": {"$ref": "#/$defs/d"},
     "minItems": 2, "maxItems": 4},
]  # fmt: skip
LONG = schema_format({"type": "array", "items": {"type": "integer"}, "minItems": 500})


@pytest.fixture(scope="module")
def settings(tiny_folder: Path) -> EngineSettings:
    return EngineSettings(model=str(tiny_folder), dtype="float32", max_batch_size=8, kv_cache_mb=64)


@pytest.fixture(scope="module")
def backend(settings: EngineSettings) -> Iterator[LocalBackend]:
    with closing(open_local(settings)) as backend:
        yield backend


def query(text: str = "Why is the sky blue?", **changes: Any) -> Query:
    sampling = Sampling(max_new_tokens=64)
    return replace(Query("q", (Message("user", text),), sampling), **changes)


def answers(backend: LocalBackend, queries: list[Query]) -> list[Result]:
    futures = [backend.submit(query) for query in queries]
    return [future.result(WAIT_S) for future in futures]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.0}, {"temperature": 1.5, "top_p": 0.9}, {"repetition_penalty": 1.5},
     {"temperature": 1.0, "top_k": 3}],
    ids=str,
)  # fmt: skip
def test_constrained_answers_validate_and_leave_other_answers_unchanged(
    backend: LocalBackend, options: dict[str, Any]
) -> None:
    """A random model never writes JSON by itself; constrained, it cannot write anything else."""
    held = [
        query(f"Tell {n}.", format=schema_format(schema), sampling=Sampling(64, **options, seed=n))
        for n, schema in enumerate(SCHEMAS * 2)
    ]
    free = [query(f"Question {n}?", sampling=Sampling(24, **options, seed=n)) for n in range(4)]
    expected = answers(backend, free)
    *results, a, b, c, d = answers(backend, held + free)
    for result, schema in zip(results, SCHEMAS * 2, strict=True):
        assert result.error is None
        assert result.response is not None
        jsonschema.validate(json.loads(result.response), schema)
        assert result.finish_reason == FinishReason.STOP
    assert [r.response for r in (a, b, c, d)] == [r.response for r in expected]


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_formats_combine_with_other_limits_on_tokens(
    backend: LocalBackend, temperature: float
) -> None:
    """If the vocabulary fills whole words of 32 bits, llguidance's masks have one word more."""
    digits = AnswerFormat(regex="[1-9]{1,30}")
    sampling = Sampling(64, temperature, seed=1)
    short, long, other, none = answers(
        backend,
        [
            query(format=AnswerFormat(choices=("ja", "nein")), sampling=sampling, bad_words=("j",)),
            query(format=digits, sampling=replace(sampling, min_tokens=20)),
            query(format=digits, sampling=sampling, bad_words=tuple("12345678")),
            query(format=digits, sampling=replace(sampling, allowed_token_ids=(0,))),
        ],
    )
    assert short.response == "nein"
    assert re.fullmatch("[1-9]{20,30}", str(long.response))
    assert re.fullmatch("9{1,30}", str(other.response))
    assert (none.error_code, "contradict each other" in str(none.error)) == ("invalid_value", True)


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_answer_is_one_of_the_choices(backend: LocalBackend, temperature: float) -> None:
    """Choices may share a prefix, and regex metacharacters in them are literal."""
    choices = ("yes", "yes, but (not)* [now]", "nein", "日本 \\d+", "<|im_end|>")
    sampling = [Sampling(64, temperature, seed=n) for n in range(20)]
    results = answers(
        backend, [query(format=AnswerFormat(choices=choices), sampling=s) for s in sampling]
    )
    assert {r.response for r in results} <= set(choices)
    assert len({r.response for r in results}) > (1 if temperature else 0)


def test_truncated_json_is_an_error(backend: LocalBackend) -> None:
    cut, by_the_model, whole = answers(
        backend,
        [
            query(format=LONG, sampling=Sampling(9)),
            query(format=LONG, sampling=Sampling(5000)),
            query(format=schema_format({"type": "integer"}), sampling=Sampling(2)),
        ],
    )
    assert (cut.error_code, by_the_model.error_code) == (ErrorCode.INCOMPLETE_JSON,) * 2
    assert "cut off after 9 tokens" in str(cut.error)
    assert (cut.finish_reason, str(cut.response)[:1]) == ("length", "[")
    assert cut.record()["response"] == cut.response
    assert whole.error is not None or isinstance(json.loads(str(whole.response)), int)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum .5. is greater"),
        ({"$ref": "#"}, "no text can match it"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"properties": {"a": False}, "type": "object", "required": ["a"]}, "unsatisfiable"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf is not supported; use anyOf"),
        (
            {"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(20)]},
            "more than 12 patterns",
        ),
        ({"type": "object", "x-guidance": {"whitespace_pattern": "x"}}, "x-guidance"),
    ],
    ids=str,
)
def test_unsupported_schema_fails_only_its_query(
    backend: LocalBackend, schema: dict[str, Any], reason: str
) -> None:
    bad, good = answers(backend, [query(format=schema_format(schema)), query()])
    assert (bad.error_code, bad.field) == (ErrorCode.INVALID_VALUE, "response_format")
    assert reason.replace(".5.", "(5)") in str(bad.error)
    assert not good.is_error


def test_schema_that_exceeds_the_lexer_limits_fails_with_an_explanation(tiny_folder: Path) -> None:
    """The automaton grows with every character until llguidance's limits stop it."""
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    compiler = GrammarCompiler(tokenizer.to_str, tokenizer.get_vocab_size(), frozenset([2]))
    schema = {"type": "string", "pattern": "^.*(a.{9}|b.{99}|[ab].*a.{30})+.{200}$"}
    matcher = compiler.matcher(GrammarSpec(schema_format(schema)))
    text = random.Random(0)
    for char in ['"', *text.choices("ab", k=300)]:
        assert not matcher.is_complete
        if not matcher.is_over:
            matcher.mask()
            token_id = tokenizer.token_to_id(char)
            assert token_id is not None
            matcher.accept(token_id)
    assert matcher.is_over
    assert "its patterns are too complex" in str(matcher.error)


@pytest.mark.parametrize(
    ("name", "code"),
    [("PanicException", ErrorCode.INVALID_VALUE), ("Else", ErrorCode.INTERNAL)],
)
def test_llguidance_panic_fails_only_its_query(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, name: str, code: ErrorCode
) -> None:
    """pyo3 raises Rust panics as a BaseException, which once left the run waiting forever."""
    panic = type(name, (BaseException,), {})

    def fail(*args: Any, **options: Any) -> str:
        raise panic("index out of bounds")

    monkeypatch.setattr("llguidance.LLMatcher", SimpleNamespace(grammar_from_json_schema=fail))
    unseen = schema_format({"type": "array", "items": {"type": "integer"}, "minItems": 499})
    bad, good = answers(backend, [query(format=unseen), query()])
    assert bad.error_code == code
    assert "index out of bounds" in str(bad.error)
    assert not good.is_error


def test_json_object_format_accepts_any_object(backend: LocalBackend) -> None:
    sampling = [Sampling(200, 1.0, seed=n) for n in range(12)]
    results = answers(
        backend, [query(format=AnswerFormat(schema=JSON_OBJECT), sampling=s) for s in sampling]
    )
    whole = [json.loads(str(r.response)) for r in results if r.error is None]
    assert whole
    assert all(isinstance(value, dict) for value in whole)
    assert {r.error_code for r in results} <= {None, ErrorCode.INCOMPLETE_JSON}


def test_logprobs_cover_every_token_of_the_text(backend: LocalBackend) -> None:
    plain, told = answers(backend, [query(), query(top_logprobs=3)])
    assert told.response == plain.response
    assert plain.logprobs is None
    assert told.response is not None
    assert told.logprobs is not None
    spelled = b"".join(bytes(entry["bytes"]) for entry in told.logprobs)
    assert spelled.decode(errors="ignore").strip() == told.response.replace("\ufffd", "").strip()
    for entry in told.logprobs:
        best = entry["top_logprobs"][0]
        assert (entry["token"], entry["logprob"]) == (best["token"], best["logprob"]), "greedy"
        assert [each["logprob"] for each in entry["top_logprobs"]] == sorted(
            (each["logprob"] for each in entry["top_logprobs"]), reverse=True
        )


def test_log_probabilities_equal_transformers(backend: LocalBackend, tiny_folder: Path) -> None:
    """Also those of the most likely tokens, compared with a forward pass over the whole text."""
    import torch
    from transformers import LlamaForCausalLM

    (result,) = answers(backend, [query(top_logprobs=5, sampling=Sampling(12, 1.0, seed=3))])
    chat = ChatTokenizer.load(tiny_folder)
    spell = GrammarCompiler(chat.tokenizer_json, 384, frozenset([2])).token_bytes()
    ids = {spell(token): token for token in range(3, 384)}
    prompt = chat.encode(query().messages)
    assert result.logprobs is not None
    answer = [ids[bytes(entry["bytes"])] for entry in result.logprobs]
    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for row, token, entry in zip(expected, answer, result.logprobs, strict=True):
        most_likely = [each["logprob"] for each in entry["top_logprobs"]]
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=2e-4)
        assert most_likely == pytest.approx(row.topk(5).values.tolist(), abs=2e-4)


def test_log_probabilities_cover_only_allowed_tokens(backend: LocalBackend) -> None:
    """A forced token has probability 1, and a forbidden one is never listed."""
    asked = query(format=AnswerFormat(choices=("ab", "ac")), top_logprobs=20)
    (result,) = answers(backend, [asked])
    assert result.logprobs is not None
    assert {each["token"] for entry in result.logprobs for each in entry["top_logprobs"]} <= {
        *("a", "ab", "ac", "b", "c")
    }


def test_first_of_several_answers_equals_the_single_answer(
    backend: LocalBackend,
) -> None:
    one = query(sampling=Sampling(12, temperature=1.5, seed=5))
    several = replace(one, n=4)
    alone, first, again = answers(backend, [one, several, several])
    assert first.response == alone.response
    texts = [first.response, *(other.response for other in first.alternatives)]
    assert len(texts) == 4
    assert len(set(texts)) > 1
    assert texts == [again.response, *(other.response for other in again.alternatives)]
    assert first.usage is not None
    assert alone.usage is not None
    assert first.usage.prompt_tokens == alone.usage.prompt_tokens
    record = first.record()
    assert [each["response"] for each in record["alternatives"]] == texts[1:]
    assert "usage" not in record["alternatives"][0]


def test_partial_json_is_an_answer_if_the_query_accepts_it(backend: LocalBackend) -> None:
    asked = query(format=LONG, sampling=Sampling(9))
    error, answer = answers(backend, [asked, replace(asked, accepts_partial=True)])
    assert (answer.error, answer.finish_reason) == (None, "length")
    assert answer.response == error.response
    assert answer.usage == error.usage


def test_a_stop_string_beside_a_format_ends_the_answer(backend: LocalBackend) -> None:
    """The text before it is incomplete JSON; one that never occurs changes nothing."""
    digits = schema_format({"enum": [["a", "b", "c"]]})
    plain, unmet, met, kept, late = answers(
        backend,
        [
            query(format=digits, **changes)
            for changes in (
                {},
                {"stop": ("\n\n", "<|im_end|>")},
                {"stop": ('"b"',)},
                {"stop": ("]",), "include_stop": True},
                {"stop": ("]",)},
            )
        ],
    )
    assert plain.response == unmet.response == kept.response == '["a", "b", "c"]'
    assert (met.error_code, met.response, met.finish_reason) == ("incomplete_json", '["a",', "stop")
    assert "met a stop string" in str(met.error)
    assert late.error_code == "incomplete_json"


def test_unique_items_are_accepted_and_not_enforced(backend: LocalBackend) -> None:
    """As pydantic describes sets; it removes duplicates when it parses the answer."""
    numbers = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2}
    (result,) = answers(backend, [query(format=schema_format(numbers | {"uniqueItems": True}))])
    assert result.response == "[1, 1]"


EBNF = """
root ::= select_statement
select_statement ::= "SELECT " column " from " table
column ::= "col_1 " | "col_2 "
table ::= "table_1" | "table_2"
"""
LARK = """
start: term ("+" term)?
term: NUMBER | "(" term ")"
NUMBER: /[1-3]{1,2}/
"""


@pytest.mark.parametrize(
    ("answer_format", "expected"),
    [
        (AnswerFormat(regex=r"^ [a-c]{2,4}-[0-9]\n$"), r" [a-c]{2,4}-[0-9]\n"),
        (AnswerFormat(grammar=EBNF), r"SELECT col_[12]  from table_[12]"),
        (AnswerFormat(grammar=LARK), r"\(*[1-3]{1,2}\)*(\+\(*[1-3]{1,2}\)*)?"),
    ],
    ids=["regex", "EBNF of vLLM's documentation", "Lark"],
)
def test_answers_match_a_regex_or_a_grammar_with_their_white_space(
    backend: LocalBackend, answer_format: AnswerFormat, expected: str
) -> None:
    asked = [query(format=answer_format, sampling=Sampling(64, 2.0, seed=n)) for n in range(6)]
    results = answers(backend, asked)
    whole = [str(result.response) for result in results if not result.is_error]
    assert len(set(whole)) > 1
    for text in whole:
        assert re.fullmatch(expected, text), text


@pytest.mark.parametrize(
    ("answer_format", "reason"),
    [
        (AnswerFormat(regex="(a"), "unsupported regex: unclosed group"),
        (AnswerFormat(regex="(?=a)b"), "unsupported regex: look-around"),
        (AnswerFormat(grammar="root ::= ( 'a'"), "unsupported grammar: "),
        (AnswerFormat(grammar="root ::= item"), "unsupported grammar: Rule 'item' not found"),
        (AnswerFormat(grammar='item ::= "a"'), "unsupported grammar: No 'root' rule found"),
        (AnswerFormat(grammar='root ::= "a\\'), "unsupported grammar: Unexpected end of input"),
        (AnswerFormat(grammar="root ::= " + "(" * 5000), "unsupported grammar: .* too deeply"),
        (AnswerFormat(grammar="start: B"), "unsupported grammar: .*B"),
        (AnswerFormat(grammar="start: A\nA: /a/ & /b/"), "'&' is not supported"),
        (AnswerFormat(grammar="start: %json {}"), "'%json' is not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_unsupported_regex_or_grammar_says_why(
    backend: LocalBackend, answer_format: AnswerFormat, reason: str
) -> None:
    (result,) = answers(backend, [query(format=answer_format)])
    assert (result.error_code, result.field) == ("invalid_value", "structured_outputs")
    assert re.search(reason, str(result.error))
    with pytest.raises(QueryError, match=reason):
        check_format(answer_format)


REFERENCES = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(4000)} | {"d4000": {"const": 1}}
RULES = ["start: r0", *(f"r{n}: r{n + 1}" for n in range(4000)), 'r4000: "a"']


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_object",
                "schema": {"$ref": "#/$defs/d0", "$defs": REFERENCES},
            }
        },
        {"structured_outputs": {"grammar": "\n".join(RULES)}},
    ],
    ids=["schema", "grammar"],
)
def test_a_long_chain_of_rules_does_not_end_the_process(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    """It overflowed the stack, so that one query killed a server and all that it was doing."""
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"chat_id": "1", "user_prompt": "Hi"} | fields), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "smolcli", "run", str(path), "--check"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert (done.returncode, done.stderr) == (0, b"1 line, 0 invalid\n")


def test_a_schema_that_is_too_large_says_so() -> None:
    schema: dict[str, Any] = {"const": 1}
    definitions = {
        f"d{n}": {"properties": {"x": {"$ref": f"#/$defs/d{n + 1}"}}, "required": ["x"]}
        for n in range(15_000)
    }
    definitions["d15000"] = schema
    with pytest.raises(QueryError, match=r"unsupported schema: (it is|schema) too large"):
        check_format(schema_format({"$ref": "#/$defs/d0", "$defs": definitions}))


def test_error_of_one_answer_fails_the_query(backend: LocalBackend) -> None:
    asked = query(format=LONG, sampling=Sampling(9, 1.0), n=3)
    (result,) = answers(backend, [asked])
    assert result.error_code == ErrorCode.INCOMPLETE_JSON
    assert not result.alternatives


def test_cancelling_several_answers_frees_all_slots(backend: LocalBackend) -> None:
    future = backend.submit(query(sampling=Sampling(400, 1.0), n=8))
    assert future.cancel()
    answers(backend, [query()])
    health = backend.health()
    assert (health.num_running, health.num_waiting) == (0, 0)


@pytest.mark.model
def test_the_real_model_extracts(model_folder: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    text = "Extract the name and the age as JSON: Maria Lopez is 34 and lives in Madrid."
    settings = EngineSettings(model=str(model_folder), max_batch_size=2, kv_cache_mb=64)
    with closing(open_local(settings)) as backend:
        (result,) = answers(backend, [query(text, format=schema_format(schema), top_logprobs=1)])
    assert json.loads(str(result.response)) == {"name": "Maria Lopez", "age": 34}
    assert result.logprobs is not None
    assert "".join(entry["token"] for entry in result.logprobs) == result.response
