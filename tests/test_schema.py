"""The one parser of a query: what it takes, and the code, field and sentence of what it refuses."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolcli.errors import QueryError
from smolcli.protocol.query import FIELDS, chat_id_of, load_json, parse_query
from smolcli.settings import QueryDefaults
from smolcli.types import Message, Sampling

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


def test_the_smallest_query_gets_the_defaults() -> None:
    query = parse_query(HI, QueryDefaults(), line=7)
    assert (query.chat_id, query.messages, query.line) == ("1", (Message("user", "Hi"),), 7)
    assert query.sampling.is_greedy
    assert query.sampling.max_new_tokens == 256
    assert (query.stop, query.metadata) == ((), None)


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
            "stop": ["a", "b"],
            "metadata": {"row": 1},
        },
        QueryDefaults(),
    )
    assert query.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert query.sampling == Sampling(5, 1.0, 0.5, 3, 1.1, 2**63 - 1)
    assert query.stop == ("a", "b")
    assert query.metadata == {"row": 1}


@pytest.mark.parametrize("field", sorted(set(FIELDS) - {"chat_id", "user_prompt"}))
def test_null_is_absent(field: str) -> None:
    assert parse_query(HI | {field: None}, QueryDefaults()) == parse_query(HI, QueryDefaults())


def test_an_integer_id_is_its_decimal_string() -> None:
    assert parse_query(HI | {"chat_id": -7}, QueryDefaults()).chat_id == "-7"


def test_one_stop_string_is_a_list_of_one() -> None:
    assert parse_query(HI | {"stop": "\n"}, QueryDefaults()).stop == ("\n",)


def test_messages_take_the_default_system_prompt_unless_they_have_one() -> None:
    defaults = QueryDefaults(system_prompt="Be brief.")
    user = {"role": "user", "content": "Hi"}
    own = {"role": "system", "content": "Be long."}
    plain = parse_query({"chat_id": "1", "messages": [user]}, defaults)
    assert [turn.content for turn in plain.messages] == ["Be brief.", "Hi"]
    with_own = parse_query({"chat_id": "1", "messages": [own, user]}, defaults)
    assert [turn.content for turn in with_own.messages] == ["Be long.", "Hi"]


def test_an_empty_system_prompt_is_the_default() -> None:
    query = parse_query(HI | {"system_prompt": ""}, QueryDefaults(system_prompt="Be brief."))
    assert query.messages[0] == Message("system", "Be brief.")


def test_a_seed_depends_on_the_run_and_the_id_alone() -> None:
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
def test_what_is_required_cannot_be_empty(field: str, value: str | None) -> None:
    query = {k: v for k, v in (HI | {field: value}).items() if v != "absent"}
    assert refusal(query) == ("missing_field", field, f"{field} is required and cannot be empty")


def test_a_blank_prompt_is_no_prompt() -> None:
    assert refusal(HI | {"user_prompt": " \n\t"})[:2] == ("missing_field", "user_prompt")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("chat_id", 1.5, "chat_id must be a non-empty string or an integer"),
        ("chat_id", True, "chat_id must be a non-empty string or an integer"),
        ("user_prompt", 3, "user_prompt must be a string that is not blank"),
        ("system_prompt", ["x"], "system_prompt must be a string"),
        ("max_new_tokens", 0, "max_new_tokens must be a whole number from 1"),
        ("max_new_tokens", 1.0, "max_new_tokens must be a whole number from 1"),
        ("max_new_tokens", "8", "max_new_tokens must be a whole number from 1"),
        ("temperature", -0.1, "temperature must be a number from 0 (greedy) to 100"),
        ("temperature", True, "temperature must be a number from 0 (greedy) to 100"),
        ("top_p", 0, "top_p must be a number above 0 and up to 1"),
        ("top_p", 1.01, "top_p must be a number above 0 and up to 1"),
        ("top_k", -1, "top_k must be a whole number from 0 (off)"),
        ("repetition_penalty", 0, "repetition_penalty must be a number above 0 and up to 100"),
        ("seed", -1, "seed must be a whole number from 0 to 2^63 - 1"),
        ("seed", 2**63, "seed must be a whole number from 0 to 2^63 - 1"),
        ("stop", "", "stop must be a non-empty string or a list of up to 16 of them"),
        ("stop", ["x"] * 17, "stop must be a non-empty string or a list of up to 16 of them"),
        ("stop", 5, "stop must be a non-empty string or a list of up to 16 of them"),
        ("metadata", [], "metadata must be an object"),
    ],
)
def test_a_bad_value_is_told_what_it_must_be(field: str, value: object, sentence: str) -> None:
    assert refusal(HI | {field: value}) == ("invalid_value", field, sentence)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages must be a non-empty list of {role, content}, the last from the user"),
        ([{"role": "user"}], "(at messages[0].content)"),
        ([{"role": "robot", "content": "x"}], "(at messages[0].role)"),
        ([{"role": "user", "content": "x", "name": "y"}], "(at messages[0].name)"),
        ([{"role": "assistant", "content": "x"}], "messages must end with a user's turn"),
        ([{"role": "user", "content": " "}], "messages must end with a user's turn, not blank"),
    ],
)
def test_bad_messages_say_where(messages: list[Any], sentence: str) -> None:
    code, field, said = refusal({"chat_id": "1", "messages": messages})
    assert (code, field) == ("invalid_value", "messages")
    assert sentence in said


@pytest.mark.parametrize("field", ["user_prompt", "system_prompt"])
def test_messages_stand_alone(field: str) -> None:
    query = {"chat_id": "1", "messages": [{"role": "user", "content": "x"}], field: "y"}
    assert refusal(query) == ("invalid_value", field, f"{field} cannot stand beside messages")


def test_a_slip_is_named_before_the_field_it_leaves_missing() -> None:
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
        (b'"\\ud800"', "a string holds a lone surrogate"),
        (b'{"\\udfff": 1}', "a string holds a lone surrogate"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"1e999", "the number 1e999 is too large"),
        (b"9" * 5000, "Exceeds the limit"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b"[" * 65 + b"1" + b"]" * 65, "nested more than 64 levels deep"),
        (b"[" * 100_000, "nested more than 64 levels deep"),
    ],
)
def test_what_is_not_json_says_why(text: bytes, reason: str) -> None:
    assert json_refusal(text).startswith(f"invalid JSON: {reason}")


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert load_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("value", "chat_id"),
    [({"chat_id": 5}, "5"), ({"chat_id": ""}, ""), ({"chat_id": None}, None), ([], None)],
)
def test_an_id_is_read_from_what_is_no_query(value: object, chat_id: str | None) -> None:
    assert chat_id_of(value) == chat_id


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_json_or_refused(text: bytes) -> None:
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
def test_any_object_is_a_query_or_refused(value: dict[str, Any]) -> None:
    for extra_fields in ("error", "ignore", "keep"):
        with suppress(QueryError):
            query = parse_query(value, QueryDefaults(extra_fields=extra_fields))
            assert query.chat_id
            assert query.messages[-1].content.strip()
