"""Lines of messages, prompts and conversations without ids, and plain text."""

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import DyingBackend, EchoBackend
from run_tools import answer, results
from typer.testing import CliRunner

from smolcli.cli.main import app
from smolcli.data.reader import read_rows
from smolcli.errors import BackendError, QueryError
from smolcli.protocol.line_formats import BARE, OPENAI, SMOL, detect_format
from smolcli.settings import ALL_FIELDS, QueryDefaults, RowSettings, RunSettings
from smolcli.types import ErrorCode, Query

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello!"}


def parse(value: object, **defaults: Any) -> Query:
    return BARE.parse(value, QueryDefaults(**defaults), 4)


def contents(query: Query) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in query.messages]


def test_body_of_a_chat_completion_is_a_query() -> None:
    query = parse({"model": "x", "stream": True, "messages": [USER], "max_tokens": 7, "seed": 3})
    assert (query.chat_id, query.line) == ("4", 4)
    assert (query.sampling.max_new_tokens, query.sampling.seed) == (7, 3)
    assert contents(query) == [("user", "Hi")]
    assert parse({"prompt": "Hi", "max_new_tokens": 7}).sampling.max_new_tokens == 7


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "Hi"}, [("user", "Hi")]),
        ({"prompt": "Hi", "system": "Be brief."}, [("system", "Be brief."), ("user", "Hi")]),
        ({"prompt": [USER, USER]}, [("user", "Hi"), ("user", "Hi")]),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi"}]},
            [("system", "s"), ("user", "Hi")],
        ),
        ({"conversations": [{"role": "user", "content": "Hi"}]}, [("user", "Hi")]),
    ],
)
def test_prompts_and_conversations_become_messages(
    line: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert contents(parse(line)) == expected


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [USER, ANSWER | {"weight": 1}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"prompt": "Hi", "completion": "Hello!"},
    ],
)
def test_reference_answer_is_moved_to_the_metadata(line: dict[str, Any]) -> None:
    query = parse(line | {"metadata": {"split": "test"}})
    assert contents(query) == [("user", "Hi")]
    assert query.metadata == {"reference": "Hello!", "split": "test"}


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ({"prompt": 3}, "prompt must be a string", ErrorCode.INVALID_VALUE),
        ({"prompt": " "}, "prompt must not be blank", ErrorCode.MISSING_FIELD),
        ({"prompt": "a", "messages": [USER]}, "prompt cannot be combined with messages", None),
        ({"prompt": "a", "category": 3}, "category is not supported", ErrorCode.UNKNOWN_FIELD),
        ({"messages": [{"role": "user"}]}, "messages[0].content is required", None),
        ({"messages": [ANSWER]}, "messages must be a non-empty list", None),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "from 'tool' is not supported", None),
        ({"conversations": ["x"]}, "conversations[0] must be an object", None),
        ({"conversations": [{"from": "human"}]}, "must have two strings", None),
        ({"chat_id": "1", "prompt": "a"}, "this line is in smol's own format", None),
        ({"custom_id": "1", "messages": [USER]}, "this line is in OpenAI's batch format", None),
        ({"x": 1}, "messages, prompt or conversations is required", ErrorCode.MISSING_FIELD),
        ([], "a line must be a JSON object", ErrorCode.NOT_AN_OBJECT),
    ],
)
def test_invalid_bare_line_is_explained(line: Any, said: str, code: ErrorCode | None) -> None:
    with pytest.raises(QueryError) as caught:
        parse(line)
    assert said in str(caught.value)
    assert code in (None, caught.value.code)


def test_unknown_members_may_be_kept_or_ignored() -> None:
    line = {"prompt": "Hi", "category": 3}
    assert parse(line, extra_fields="keep").metadata == {"category": 3}
    assert parse(line, extra_fields="ignore").metadata is None


def test_id_is_that_of_the_line_or_its_number() -> None:
    """An invalid line has one as well, so that its error record can be found."""
    assert parse({"id": 7, "prompt": "Hi"}).chat_id == "7"
    assert BARE.id_of({"prompt": 3}, 9) == "9"
    assert BARE.id_of(b"{", 9) == "9"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"prompt": "Hi"}], BARE),
        ([b"{", {"messages": [USER, ANSWER]}], BARE),
        ([{"messages": []}, {"prompt": 3}], BARE),
        ([{"chat_id": 1, "messages": [ANSWER]}, {"chat_id": 2, "user_prompt": "x"}], SMOL),
        ([{"custom_id": "1", "prompt": "x"}], SMOL),
        ([{"custom_id": "1", "url": "/v1/chat/completions"}], OPENAI),
    ],
)
def test_bare_lines_are_detected(lines: list[object], expected: object) -> None:
    assert detect_format(lines, QueryDefaults()) is expected


def test_options_map_bare_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines: list[dict[str, Any]] = [
        {"id": "a", "prompt": "Hi", "split": 1},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    ]
    lines[1]["split"] = 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [row.value for row in read_rows(path, RowSettings(fields=("split",)))]
    assert rows == [
        {"chat_id": "a", "messages": [USER], "metadata": {"split": 1}},
        {
            "chat_id": "2",
            "messages": [{"role": "user", "content": "x"}],
            "metadata": {"reference": "y", "split": 2},
        },
    ]


BARE_LINES = (
    '{"prompt": "a b"}\n{"prompt": 3}\n\n{"messages": [{"role": "user", "content": "c"}]}\n'
)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("in.jsonl", BARE_LINES, [1, 2, 4]),
        ("in.json", '[{"prompt": "a"}, {"prompt": 3}, {"prompt": "b"}]', [1, 2, 3]),
        ("in.txt", "a, b\n\nc, d\n \ne\n", [1, 3, 5]),
    ],
)
def test_runs_over_bare_lines_and_text_resume(
    tmp_path: Path, name: str, text: str, lines: list[int]
) -> None:
    source, output = tmp_path / name, tmp_path / "out.jsonl"
    source.write_text(text)
    whole = RunSettings(source, tmp_path / "whole.jsonl", seed=1)
    answer(whole)
    job = RunSettings(source, output, seed=1)
    with pytest.raises(BackendError):
        answer(job, lambda settings: DyingBackend(1, window=1))
    answer(job)
    assert output.read_bytes() == whole.output.read_bytes()
    assert [record["line"] for record in results(output)] == lines
    assert [record["chat_id"] for record in results(output)] == [str(line) for line in lines]


def test_text_has_a_prompt_on_every_line(tmp_path: Path) -> None:
    """Commas do not make prose a table; columns in the options do."""
    path = tmp_path / "in.txt"
    path.write_bytes(b'Well, hello\n  Yes, I am\nnot "JSON\n\xff\n')
    rows = list(read_rows(path, RowSettings()))
    prompts = [row.value["user_prompt"] for row in rows[:3] if isinstance(row.value, dict)]
    assert prompts == ["Well, hello", "  Yes, I am", 'not "JSON']
    assert "not valid UTF-8" in str(rows[3].error)
    path.write_text("word\tlang\nsea\tFrench\n")
    table = list(read_rows(path, RowSettings("Say {word} in {lang}")))
    assert [row.value for row in table] == [{"chat_id": "2", "user_prompt": "Say sea in French"}]


def test_a_template_of_the_text_keeps_prose_with_commas_text(tmp_path: Path) -> None:
    """`{text}` names the line, unless the first row names a column so."""
    path = tmp_path / "in.txt"
    settings = RowSettings("Say {text}", fields=ALL_FIELDS)
    for content, prompts in {
        "Hello, Anna\nGood morning, Ben\n": ["Say Hello, Anna", "Say Good morning, Ben"],
        "n,text\n1,sea\n": ["Say sea"],
    }.items():
        path.write_text(content)
        rows = [row.value for row in read_rows(path, settings)]
        assert [row["user_prompt"] for row in rows if isinstance(row, dict)] == prompts


def test_text_format_can_be_stated(tmp_path: Path) -> None:
    path = tmp_path / "in.md"
    path.write_text("Sea\nBread\n")
    args = ["run", str(path), "--input-format", "text", "--prompt", "Say {text}!", "-q"]
    assert CliRunner().invoke(app, args, obj=EchoBackend).exit_code == 0
    records = results(tmp_path / "in.results.jsonl")
    assert [record["chat_id"] for record in records] == ["1", "2"]
    assert records[0]["response"].startswith("Say Sea! (")
    refused = CliRunner().invoke(app, ["run", str(path), "--check"], obj=EchoBackend)
    assert "such as text for one prompt per line" in refused.stderr


def test_final_assistant_message_can_be_continued() -> None:
    """It is no reference answer if the line says so."""
    query = parse({"messages": [USER, ANSWER], "continue_final_message": True})
    assert contents(query)[-1] == ("assistant", "Hello!")
    assert query.metadata is None
