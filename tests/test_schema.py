"""Parsing queries and chat completions: what is accepted, and how the rest is refused."""

import codecs
import json
import re
import sys
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openai.types.chat import ParsedChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from pydantic import BaseModel

from smolcli.errors import PromptTooLong, QueryError
from smolcli.protocol.answer_formats import JSON_OBJECT, format_fields, schema_format
from smolcli.protocol.chat_completions import CompletionFields, parse_completion
from smolcli.protocol.fields import LOGIT_BIAS, NOT_BLANK
from smolcli.protocol.json_text import load_json
from smolcli.protocol.openai import error_code, error_object
from smolcli.protocol.parameters import validated
from smolcli.protocol.prompt import prompt_query
from smolcli.protocol.query import FIELDS, QueryFields, chat_id_of, parse_query
from smolcli.protocol.responses import ResponsesFields
from smolcli.protocol.text_completions import TextCompletionFields
from smolcli.settings import QueryDefaults
from smolcli.types import AnswerFormat, ErrorCode, Message, PromptLimit, Query, Sampling

MAX_NEW_TOKENS = "a positive integer, or 0 if prompt_logprobs or echo is given"
HI = {"chat_id": "1", "user_prompt": "Hi"}


def refusal(value: object) -> tuple[str, Any, str]:
    with pytest.raises(QueryError) as caught:
        parse_query(value, QueryDefaults())
    return str(caught.value.code), caught.value.field, str(caught.value)


def json_refusal(text: bytes) -> str:
    with pytest.raises(QueryError) as caught:
        load_json(text)
    assert caught.value.code == "invalid_json"
    assert caught.value.field is None
    return str(caught.value)


def test_minimal_query_gets_the_defaults() -> None:
    query = parse_query(HI, QueryDefaults(), line=7)
    assert (query.chat_id, query.messages, query.line) == ("1", (Message("user", "Hi"),), 7)
    assert query.sampling.is_greedy
    assert query.sampling.max_new_tokens == 256
    assert (query.stop, query.metadata) == ((), None)


@pytest.mark.parametrize(
    "defaults",
    [
        QueryDefaults(),
        QueryDefaults(
            Sampling(temperature=0.5, seed=7), "Be brief.", format=AnswerFormat(choices=("a", "b"))
        ),
    ],
)
def test_a_prompt_without_fields_becomes_the_same_query(defaults: QueryDefaults) -> None:
    assert prompt_query("1", "Hi", defaults) == parse_query(HI, defaults)


def test_every_field_reaches_the_query() -> None:
    query = parse_query(
        HI
        | {
            "system_prompt": "Be brief.",
            "max_new_tokens": 5,
            "temperature": 1,
            "top_p": 0.5,
            "top_k": 3,
            "repetition_penalty": 1.1,
            "seed": 2**63 - 1,
            "min_p": 0.1,
            "presence_penalty": -2,
            "frequency_penalty": 0.5,
            "logit_bias": {"7": -100, "3": 1.5, "4": 0},
            "min_tokens": 4,
            "ignore_eos": True,
            "stop_token_ids": [9, 8, 9],
            "allowed_token_ids": [5.0, 3],
            "stop": ["a", "b"],
            "include_stop_str_in_output": True,
            "bad_words": ["spam"],
            "metadata": {"row": 1},
        },
        QueryDefaults(),
    )
    assert query.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert query.sampling == Sampling(
        max_new_tokens=5,
        temperature=1.0,
        top_p=0.5,
        top_k=3,
        repetition_penalty=1.1,
        seed=2**63 - 1,
        min_p=0.1,
        presence_penalty=-2.0,
        frequency_penalty=0.5,
        logit_bias=((3, 1.5), (7, -100.0)),
        min_tokens=4,
        ignore_eos=True,
        stop_token_ids=(8, 9),
        allowed_token_ids=(3, 5),
    )
    assert (query.stop, query.include_stop, query.bad_words) == (("a", "b"), True, ("spam",))
    assert query.metadata == {"row": 1}


@pytest.mark.parametrize("field", sorted(set(FIELDS) - {"chat_id", "user_prompt"}))
def test_null_means_absent(field: str) -> None:
    assert parse_query(HI | {field: None}, QueryDefaults()) == parse_query(HI, QueryDefaults())


def test_a_seed_of_minus_one_is_the_default_and_other_negative_seeds_count() -> None:
    seeds = [
        parse_query(HI | {"seed": seed}, QueryDefaults()).sampling.seed
        for seed in (None, -1, -2, 2, -(2**63))
    ]
    assert seeds[0] == seeds[1]
    assert seeds[2:] == [-2, 2, -(2**63)]


SAMPLING_BODY = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 4, "repetition_penalty": 1.5, "min_p": 0.1,
    "presence_penalty": 1, "frequency_penalty": 0.5, "logit_bias": {"7": -100}, "seed": -7,
    "min_tokens": 3, "ignore_eos": True, "stop": ["x"], "stop_token_ids": [9],
    "include_stop_str_in_output": True, "bad_words": ["spam"], "allowed_token_ids": [3, 7, 9],
}  # fmt: skip


def test_both_formats_have_the_same_sampling_fields() -> None:
    own = parse_query(HI | SAMPLING_BODY | {"max_new_tokens": 8}, QueryDefaults())
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    assert parse_completion(body | SAMPLING_BODY, QueryDefaults(), "1").query == own


def test_integer_id_becomes_its_decimal_string() -> None:
    assert parse_query(HI | {"chat_id": -7}, QueryDefaults()).chat_id == "-7"


def test_single_stop_string_is_accepted() -> None:
    assert parse_query(HI | {"stop": "\n"}, QueryDefaults()).stop == ("\n",)


def test_default_system_prompt_applies_unless_messages_have_one() -> None:
    defaults = QueryDefaults(system_prompt="Be brief.")
    user = {"role": "user", "content": "Hi"}
    own = {"role": "system", "content": "Be long."}
    plain = parse_query({"chat_id": "1", "messages": [user]}, defaults)
    assert [turn.content for turn in plain.messages] == ["Be brief.", "Hi"]
    with_own = parse_query({"chat_id": "1", "messages": [own, user]}, defaults)
    assert [turn.content for turn in with_own.messages] == ["Be long.", "Hi"]


def test_empty_system_prompt_omits_the_default_one() -> None:
    """It used to count as absent, so nothing could undo --system for one query."""
    query = parse_query(HI | {"system_prompt": ""}, QueryDefaults(system_prompt="Be brief."))
    assert query.messages == (Message("user", "Hi"),)


@pytest.mark.parametrize(
    ("field", "value"),
    [("chat_id", 7.0), ("max_new_tokens", 8.0), ("top_k", 2.0), ("seed", 3.0), ("n", 1.0)],
)
def test_whole_float_is_a_whole_number(field: str, value: float) -> None:
    """JSON has one number type, and pandas writes 1.0 where a column has missing values."""
    assert parse_query(HI | {field: value}, QueryDefaults()) == parse_query(
        HI | {field: int(value)}, QueryDefaults()
    )


def test_seed_depends_only_on_run_seed_and_id() -> None:
    def seed(run_seed: int, chat_id: str) -> int:
        defaults = QueryDefaults(Sampling(seed=run_seed))
        return parse_query(HI | {"chat_id": chat_id}, defaults).sampling.seed

    assert seed(1, "a") == seed(1, "a")
    assert len({seed(1, "a"), seed(1, "b"), seed(2, "a")}) == 3


@pytest.mark.parametrize(
    ("value", "kind"),
    [([HI], "an array"), ("Hi", "a string"), (3, "a number"), (None, "null"), (True, "a boolean")],
)
def test_only_an_object_is_a_query(value: object, kind: str) -> None:
    sentence = f"a query must be a JSON object, not {kind}"
    assert refusal(value) == ("not_an_object", None, sentence)


@pytest.mark.parametrize("field", ["chat_id", "user_prompt"])
@pytest.mark.parametrize("value", ["absent", None, ""])
def test_required_fields_cannot_be_empty(field: str, value: str | None) -> None:
    query = {k: v for k, v in (HI | {field: value}).items() if v != "absent"}
    assert refusal(query) == ("missing_field", field, f"{field} is required and cannot be empty")


def test_blank_prompt_is_rejected() -> None:
    assert refusal(HI | {"user_prompt": " \n\t"})[:2] == ("missing_field", "user_prompt")


def test_documented_white_space_is_what_the_parser_strips() -> None:
    """To JSON Schema, unlike to `str.strip`, \\x1d is not white space and \\ufeff is."""
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    assert re.sub(NOT_BLANK, "", characters) == "".join(filter(str.isspace, characters))
    with pytest.raises(QueryError, match="bad_words"):
        parse_query(HI | {"bad_words": ["\x1d"]}, QueryDefaults())
    assert parse_query(HI | {"bad_words": ["\ufeff"]}, QueryDefaults()).bad_words == ("\ufeff",)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("chat_id", 1.5, "chat_id must be a non-empty string or an integer"),
        ("chat_id", True, "chat_id must be a non-empty string or an integer"),
        ("user_prompt", 3, "user_prompt must be a non-blank string"),
        (
            "system_prompt",
            ["x"],
            "system_prompt must be a string; an empty one omits the default system prompt",
        ),
        ("max_new_tokens", 0, "max_new_tokens 0 requires prompt_logprobs or echo"),
        ("max_new_tokens", 1.5, f"max_new_tokens must be {MAX_NEW_TOKENS}"),
        ("chat_id", 1e300, "chat_id must be a non-empty string or an integer"),
        ("max_new_tokens", "8", f"max_new_tokens must be {MAX_NEW_TOKENS}"),
        ("temperature", -0.1, "temperature must be a number from 0 (greedy) to 100"),
        ("temperature", True, "temperature must be a number from 0 (greedy) to 100"),
        ("top_p", 0, "top_p must be a number greater than 0 and at most 1"),
        ("top_p", 1.01, "top_p must be a number greater than 0 and at most 1"),
        ("top_k", -1, "top_k must be a non-negative integer; 0 disables it"),
        (
            "repetition_penalty",
            0,
            "repetition_penalty must be a number greater than 0 and at most 100",
        ),
        ("seed", 2**63, "seed must be an integer from -2^63 to 2^63 - 1; -1 means the default"),
        ("min_p", 1.5, "min_p must be a number from 0 (no minimum) to 1"),
        ("presence_penalty", 2.5, "presence_penalty must be a number from -2 to 2"),
        ("frequency_penalty", -3, "frequency_penalty must be a number from -2 to 2"),
        ("logit_bias", {"5": 101}, f"logit_bias must be {LOGIT_BIAS}"),
        ("logit_bias", {"05": 1}, f"logit_bias must be {LOGIT_BIAS}"),
        ("logit_bias", {"hello": 1}, f"logit_bias must be {LOGIT_BIAS}"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, f"logit_bias must be {LOGIT_BIAS}"),
        ("min_tokens", -1, "min_tokens must be a non-negative integer"),
        ("ignore_eos", "yes", "ignore_eos must be true or false"),
        ("stop_token_ids", 5, "stop_token_ids must be a list of up to 1,024 token ids"),
        ("bad_words", [" "], "bad_words must be a list of up to 1,024 non-blank strings"),
        ("stop", "", "stop must be a non-empty string or a list of up to 16 of them"),
        ("stop", ["x"] * 17, "stop must be a non-empty string or a list of up to 16 of them"),
        ("stop", 5, "stop must be a non-empty string or a list of up to 16 of them"),
        ("metadata", [], "metadata must be an object"),
    ],
)
def test_invalid_value_names_the_valid_ones(field: str, value: object, sentence: str) -> None:
    assert refusal(HI | {field: value}) == ("invalid_value", field, sentence)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages must be a non-empty list of {role, content}, ending with a user message"),
        ([{"role": "user", "content": 5}], "(at messages[0].content)"),
        ([{"role": "robot", "content": "x"}], "(at messages[0].role)"),
        ([{"role": "user", "content": "x", "name": "y"}], "(at messages[0].name)"),
        (
            [{"role": "assistant", "content": " "}],
            "messages must end with a non-blank user message, the result of a tool, or",
        ),
        ([{"role": "user", "content": " "}], "end with a non-blank user message"),
    ],
)
def test_invalid_message_is_located(messages: list[Any], sentence: str) -> None:
    code, field, said = refusal({"chat_id": "1", "messages": messages})
    assert (code, field) == ("invalid_value", "messages")
    assert sentence in said


@pytest.mark.parametrize("field", ["user_prompt", "system_prompt"])
def test_messages_exclude_prompts(field: str) -> None:
    query = {"chat_id": "1", "messages": [{"role": "user", "content": "x"}], field: "y"}
    assert refusal(query) == ("invalid_value", field, f"{field} cannot be combined with messages")


def test_misspelled_field_is_reported_before_the_missing_one() -> None:
    assert refusal({"chat_id": "1", "user_promt": "Hi"}) == (
        "unknown_field",
        "user_promt",
        "unknown field 'user_promt'; did you mean 'user_prompt'?",
    )
    assert refusal(HI | {"colour": 1})[2] == "unknown field 'colour'"


def test_extra_fields_can_be_ignored_or_kept() -> None:
    row = HI | {"colour": "red", "metadata": {"row": 1}}
    assert parse_query(row, QueryDefaults(extra_fields="ignore")).metadata == {"row": 1}
    kept = parse_query(row, QueryDefaults(extra_fields="keep"))
    assert kept.metadata == {"colour": "red", "row": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "Expecting property name enclosed in double quotes at column 2"),
        (b"", "Expecting value at column 1"),
        (b"{} {}", "Extra data at column 4"),
        (b'"caf\xe9"', "not UTF-8: byte 5 is 0xe9"),
        (b'"\\ud800"', "a string contains a lone surrogate"),
        (b'{"\\udfff": 1}', "a string contains a lone surrogate"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"1e999", "the number 1e999 is too large"),
        (b"9" * 5000, "Exceeds the limit of 4,300 digits for an integer"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b"[" * 65 + b"1" + b"]" * 65, "nested more than 64 levels deep"),
        (b"[" * 100_000, "nested more than 64 levels deep"),
    ],
)
def test_invalid_json_says_why(text: bytes, reason: str) -> None:
    assert json_refusal(text).startswith(f"invalid JSON: {reason}")


def test_byte_order_mark_of_a_line_is_dropped() -> None:
    """`cat` leaves those of all files but the first in the middle of its output."""
    assert load_json(codecs.BOM_UTF8 + b"1") == 1


def test_surrogate_pair_is_one_character() -> None:
    assert load_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("value", "chat_id"),
    [({"chat_id": 5}, "5"), ({"chat_id": ""}, ""), ({"chat_id": None}, None), ([], None)],
)
def test_id_is_read_from_an_invalid_query(value: object, chat_id: str | None) -> None:
    assert chat_id_of(value) == chat_id


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_parsed_or_rejected(text: bytes) -> None:
    with suppress(QueryError):
        json.dumps(load_json(text), ensure_ascii=False, allow_nan=False).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(list(FIELDS)), inner)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), JSON))
def test_any_object_is_parsed_or_rejected(value: dict[str, Any]) -> None:
    for extra_fields in ("error", "ignore", "keep"):
        with suppress(QueryError):
            query = parse_query(value, QueryDefaults(extra_fields=extra_fields))
            assert query.chat_id
            assert query.messages[-1].content.strip()


# Chat completions.

USER = {"role": "user", "content": "Hi"}


def completion(messages: object = None, **parameters: object) -> Query:
    body = {"model": "m", "messages": [USER] if messages is None else messages} | parameters
    return parse_completion(body, QueryDefaults(), "1").query


def completion_refusal(messages: object = None, **parameters: object) -> tuple[str | None, str]:
    with pytest.raises(QueryError) as caught:
        completion(messages, **parameters)
    return caught.value.field, str(caught.value)


@pytest.mark.parametrize(
    "name", sorted({*CompletionCreateParamsBase.__annotations__} - {"model", "messages"})
)
def test_empty_parameter_asks_for_nothing(name: str) -> None:
    empty: tuple[object, ...] = (None, "", [], {})
    for value in empty:
        assert completion(**{name: value}) == completion(), value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", "none"),
        ("function_call", "auto"),
        ("parallel_tool_calls", True),
        ("logit_bias", {"50256": 0}),
        ("store", False),
        ("metadata", {"job": "7"}),
        ("service_tier", "auto"),
        ("safety_identifier", "u"),
        ("modalities", ["text"]),
        ("reasoning_effort", "none"),
        ("verbosity", "medium"),
        ("prediction", {"type": "content", "content": "Hi"}),
        ("presence_penalty", 0),
        ("frequency_penalty", 0.0),
        ("top_logprobs", 0),
        ("n", 1),
        ("top_k", -1),
        ("min_tokens", 0),
        ("min_p", 0.0),
        ("best_of", 1),
        ("ignore_eos", False),
        ("use_beam_search", False),
        ("length_penalty", 1.0),
        ("skip_special_tokens", True),
        ("spaces_between_special_tokens", True),
        ("add_generation_prompt", True),
        ("stop_token_ids", []),
        ("guided_json", None),
        ("truncate_prompt_tokens", None),
        ("priority", 0),
        ("stream_options", {}),
        ("seed", -1),
        ("thinking_token_budget", 0),
        ("response_format", {"type": "text", "json_schema": None}),
        ("response_format", {"type": None}),
        ("structured_outputs", {"json": None, "choice": [], "disable_fallback": False}),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("audio", {"voice": ""}),
    ],
)
def test_neutral_parameter_asks_for_nothing(name: str, value: object) -> None:
    assert completion(**{name: value}) == completion()


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "schema": None, "json_schema": {"schema": {}, "name": ""}},
        {"type": "json_schema", "json_schema": {"schema": {}, "strict": None, "title": None}},
    ],
)
def test_neutral_members_of_a_response_format_ask_for_nothing(
    response_format: dict[str, Any],
) -> None:
    plain = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    assert completion(response_format=response_format) == completion(response_format=plain)
    asked = {"chat_id": "1", "user_prompt": "Hi"}
    assert parse_query(asked | {"response_format": response_format}, QueryDefaults()) == (
        parse_query(asked | {"response_format": plain}, QueryDefaults())
    )


def test_refusal_parts_and_cache_breakpoints_are_text() -> None:
    text = {"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}
    parts = [text, {"type": "refusal", "refusal": "b"}]
    turns = [{"role": "assistant", "content": parts}, {"role": "user", "content": "Hi"}]
    assert completion(messages=turns).messages[0].content == "ab"


def test_stream_options_of_openai_and_vllm_are_accepted() -> None:
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": True}
    completion(stream=True, stream_options=options)


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}])
@pytest.mark.parametrize(
    "options", [{"include_usage": True}, {"include_usage": None}, {"include_obfuscation": False}]
)
def test_stream_options_need_a_stream(stream: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(QueryError, match="only allowed if stream is true") as raised:
        completion(**stream, stream_options=options)
    assert raised.value.field == "stream_options"


SKY = {"type": "object", "properties": {"sky": {"type": "string"}}}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"response_format": {"type": "json_object", "schema": SKY}}, schema_format(SKY)),
        ({"structured_outputs": {"json": SKY}}, schema_format(SKY)),
        ({"structured_outputs": {"regex": "a+"}}, AnswerFormat(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, AnswerFormat(choices=("a", "b"))),
        ({"structured_outputs": {"grammar": "start: A"}}, AnswerFormat(grammar="start: A")),
        ({"structured_outputs": {"json_object": True}}, AnswerFormat(schema=JSON_OBJECT)),
        ({"structured_outputs": {"disable_any_whitespace": True}}, None),
        ({"guided_json": SKY}, schema_format(SKY)),
        ({"guided_regex": "a+"}, AnswerFormat(regex="a+")),
        ({"guided_choice": ["a", "b"]}, AnswerFormat(choices=("a", "b"))),
        ({"guided_grammar": "start: A"}, AnswerFormat(grammar="start: A")),
    ],
)
def test_formats_of_llama_cpp_and_vllm_are_accepted(
    parameters: dict[str, Any], expected: AnswerFormat | None
) -> None:
    query = completion(**parameters)
    assert query.format == expected
    if not next(iter(parameters)).startswith("guided"):
        assert parse_query(HI | parameters, QueryDefaults()).format == expected
    assert parse_query(HI | format_fields(expected), QueryDefaults()).format == expected


@pytest.mark.parametrize(
    ("parameters", "path", "said"),
    [
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "use tool_choice"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "numbers from -100 to 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "token ids"),
        ({"store": True}, "store", "nothing is stored"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "'audio' is not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml' is not supported"),
        ({"response_format": {"typ": "text"}}, "response_format.type", "is required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schma": {"a": 1}}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        (
            {"structured_outputs": {"json_object": True, "regex": "a"}},
            "structured_outputs",
            "one of",
        ),
        ({"max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
        ({"max_new_tokens": 5}, "max_new_tokens", "did you mean 'max_tokens'?"),
        ({"stop": ["a", ""]}, "stop[1]", "(at stop[1])"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "did you mean 'regex'?"),
        ({"guided_regex": "a", "choices": ["a"]}, "guided_regex", "combined with choices"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "with guided_choice"),
        (
            {"stream": True, "stream_options": {"include_usag": True}},
            "stream_options.include_usag",
            "did you mean 'include_usage'?",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
    ],
)
def test_unsupported_parameter_is_named_by_its_path(
    parameters: dict[str, Any], path: str, said: str
) -> None:
    field, message = completion_refusal(**parameters)
    assert field == path
    assert said in message


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("message", "path", "said"),
    [
        ({"role": "function", "content": "42"}, "role", "role 'function' is not"),
        ({"role": "tool", "content": "42"}, "tool_call_id", "is required"),
        ({"role": "tool", "tool_call_id": "c"}, "content", "is required"),
        ({"role": "user", "content": "Hi", "tool_calls": [CALL]}, "tool_calls", "'assistant'"),
        ({"role": "user", "content": "Hi", "tool_call_id": "c"}, "tool_call_id", "'tool'"),
        ({"role": "user", "content": [IMAGE]}, "content[0].type", "type 'image_url' is not"),
        (
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, IMAGE]},
            "content[1].type",
            "type 'image_url' is not supported",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text", "is required"),
        ({"role": "user"}, "content", "is required"),
        ({"role": "user", "content": None}, "content", "is required"),
        ({"content": "Hi"}, "role", "is required"),
        (
            {"role": "assistant", "tool_calls": [{"id": "c"}]},
            "tool_calls[0].function",
            "is required",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]},
            "tool_calls[0].type",
            "'custom' is not supported",
        ),
        ({"role": "user", "content": "Hi", "nam": "x"}, "nam", "did you mean 'name'?"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"indx": 1}]},
            "tool_calls[0].indx",
            "did you mean 'index'?",
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No", "x": 1}]},
            "content[0].x",
            "is not supported",
        ),
    ],
)
def test_unsupported_part_of_a_message_is_named_by_its_path(
    message: dict[str, Any], path: str, said: str
) -> None:
    """The parameter at fault used to be given as "messages", whatever was wrong in them."""
    field, text = completion_refusal([USER, message, USER])
    assert field == f"messages[1].{path}"
    assert text.startswith(f"messages[1].{path} ")
    assert said in text


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"reasoning": {"efort": 1}}, "reasoning.efort is not supported; did you mean 'effort'?"),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options.include_usage is not supported",
        ),
        ({"input": [USER | {"tool_call": "x"}]}, "input[0].tool_call is not supported"),
        (
            {"input": [USER | {"content": [{"type": "refusal", "refusal": "No", "refusl": "x"}]}]},
            "input[0].content[0].refusl is not supported; did you mean 'refusal'?",
        ),
        (
            {"tools": [{"type": "function", "name": "f", "functio": 1}]},
            "tools[0].functio is not supported",
        ),
    ],
)
def test_hint_is_a_member_of_the_object_at_fault(parameters: dict[str, Any], message: str) -> None:
    """Hints were those for chat completions: "include_usage; did you mean 'include_usage'?"."""
    with pytest.raises(QueryError) as caught:
        validated(ResponsesFields, {"input": "Hi"} | parameters)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None},
        {"role": "assistant", "content": "Hello", "annotations": [], "audio": None},
        {"role": "assistant", "content": "Hello", "function_call": None, "parsed": None},
        {"role": "assistant", "content": "Hello", "reasoning_content": None, "tool_calls": []},
        {"role": "assistant", "content": "Hello", "name": "smol"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": None, "refusal": "Hello"},
        ParsedChatCompletionMessage(role="assistant", content="Hello").model_dump(),
    ],
)
def test_earlier_answer_can_be_sent_back(message: dict[str, Any]) -> None:
    """Clients send back each member that they know of, most of them null."""
    query = completion([USER, message, USER | {"name": "bob", "audio": None}])
    assert query.messages[1] == Message("assistant", "Hello")


def test_assistant_message_may_be_empty() -> None:
    contents: tuple[Any, ...] = (None, "", [])
    for content in contents:
        query = completion([USER, {"role": "assistant", "content": content}, USER])
        assert query.messages[1] == Message("assistant", "")


@pytest.mark.parametrize(
    ("model", "value", "path"),
    [
        (CompletionFields, {"messages": [{}] * 9}, "messages[0].role"),
        (
            CompletionFields,
            {"messages": [{"role": "user", "content": [{}] * 9}]},
            "messages[0].content[0].type",
        ),
        (CompletionFields, {"messages": [USER], "modalities": ["x"] * 9}, "modalities[0]"),
        (
            CompletionFields,
            {"messages": [USER], "allowed_token_ids": [-1] * 9},
            "allowed_token_ids[0]",
        ),
        (TextCompletionFields, {"prompt": ["a", *[""] * 9]}, "prompt[1]"),
        (TextCompletionFields, {"prompt": [1, *[-1] * 9]}, "prompt[1]"),
        (TextCompletionFields, {"prompt": [[1], *[[-1]] * 9]}, "prompt[1][0]"),
        (ResponsesFields, {"input": [{}] * 9}, "input[0].role"),
    ],
)
def test_validation_of_a_list_ends_at_its_first_error(
    model: type[BaseModel], value: dict[str, Any], path: str
) -> None:
    """It named the last of them, and 200,000 invalid token ids took minutes and 600 MiB."""
    with pytest.raises(QueryError) as caught:
        validated(model, value)
    assert caught.value.field == path


def test_a_huge_unknown_name_is_not_compared_with_known_ones() -> None:
    """8 MB took 15 s and 320 MiB: difflib indexes every character."""
    name = "temperatura" * 100_000
    tracemalloc.start()
    try:
        assert "did you mean" not in refusal(HI | {name: 1})[2]
        assert tracemalloc.get_traced_memory()[1] < 4 * len(name)
    finally:
        tracemalloc.stop()


def test_prompt_too_long_is_what_openai_clients_recognize() -> None:
    """litellm looks for the context length, LangChain for "prompt is too long"."""
    exc = PromptTooLong(600, PromptLimit(511))
    error = error_object(400, str(exc), exc.code, None)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in error["message"]
    assert "prompt is too long" in error["message"]
    assert error_code(error["code"]) is ErrorCode.PROMPT_TOO_LONG
    assert error_code("invalid_value") is ErrorCode.INVALID_VALUE


def near(*values: object) -> Any:
    """Values around the edge of what a field allows."""
    return st.sampled_from([*values, None, "", [], {}, 0, 1, 1.0, 2, "x", " ", "a ", True, False])


FORMATS = [{"type": "text"}, {"type": "json_object"}, {"type": "json"}]
EITHER: dict[str, Any] = {
    "temperature": near(0.5),
    "top_k": near(-1),
    "seed": near(2**63),
    "stop": near(["x"], ["x", ""]),
    "response_format": near(*FORMATS),
    "choices": near(["a"], [""], ["a "], ["a\n"]),
    "n": near(16, 17),
    "logprobs": near(),
    "top_logprobs": near(20, 21),
    "metadata": near({"a": 1}),
    "prompt_logprobs": near(20, 21),
}
MESSAGES = near([USER], [{"role": "user"}], [USER | {"refusal": None}], [USER | {"name": "x"}])


@given(
    st.fixed_dictionaries(
        {"chat_id": near(7), "user_prompt": near("Hi")},
        optional=EITHER
        | {
            "messages": MESSAGES,
            "system_prompt": near(),
            "raw_prompt": near([1], [-1], [2**31], [1.5]),
            "echo": near(),
            "max_new_tokens": near(),
        },
    )
)
def test_schema_of_a_query_allows_what_the_parser_accepts(value: dict[str, Any]) -> None:
    """The schema used to allow `messages: null` alone, empty choices, and stop beside them."""
    assert is_accepted(parse_query, value) == QUERY_SCHEMA.is_valid(value)


@given(
    st.fixed_dictionaries(
        {"model": st.just("m"), "messages": MESSAGES},
        optional=EITHER
        | {
            "stream": near(),
            "stream_options": near({"include_usage": True}, {"include_usage": None}),
            "tools": near([1]),
            "logit_bias": near({"5": 0}, {"5": 1}, {"5": 101}, {"x": 1}),
            "other": near(),
        },
    )
)
def test_schema_of_a_completion_allows_what_the_parser_accepts(value: dict[str, Any]) -> None:
    def parse(value: object, defaults: QueryDefaults) -> object:
        return parse_completion(value, defaults, "1")

    assert is_accepted(parse, value) == COMPLETION_SCHEMA.is_valid(value)


QUERY_SCHEMA = Draft202012Validator(QueryFields.model_json_schema())
COMPLETION_SCHEMA = Draft202012Validator(CompletionFields.model_json_schema())


def is_accepted(parse: Any, value: object) -> bool:
    try:
        parse(value, QueryDefaults())
    except QueryError:
        return False
    return True
