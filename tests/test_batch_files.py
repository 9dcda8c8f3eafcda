"""OpenAI's batch format in `run_file` and `--check`, with and without `--errors`."""

import csv
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import DyingBackend, EchoBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from run_tools import answer, answer_until_killed, no_backend, results
from typer.testing import CliRunner

from smolcli.backends.local import open_local
from smolcli.batch.manifest import load_manifest, manifest_path, save_manifest
from smolcli.batch.validation import check_input
from smolcli.cli.main import app
from smolcli.errors import BackendError, QueryError, ResumeError, UsageError
from smolcli.protocol.chat_completions import parse_completion
from smolcli.protocol.line_formats import smol_record
from smolcli.settings import EngineSettings, QueryDefaults, RunSettings
from smolcli.types import Query, Result

MESSAGES = [{"role": "user", "content": "one two"}]
TOOL = {"type": "function"}


def request(custom_id: object = "a", **body: Any) -> dict[str, Any]:
    """A request line as in OpenAI's documentation."""
    whole = {"model": "gpt-4o-mini", "messages": MESSAGES} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": whole}


LINES = [
    request("a"),
    request("b", tools=[TOOL]),
    request("c", temperature=0.5),
    request("a"),
    request("d") | {"url": "/v1/embeddings"},
    "torn",
    request("e", max_tokens=3),
]


@pytest.fixture
def job(tmp_path: Path) -> RunSettings:
    """A run of LINES with a blank fourth line."""
    return write(RunSettings(tmp_path / "in.jsonl", tmp_path / "out.jsonl", seed=5), LINES)


def write(job: RunSettings, lines: list[Any]) -> RunSettings:
    """Write the lines of the input; strings are written as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    job.input.write_text("\n".join([*texts[:3], "", *texts[3:]]) + "\n", "utf-8")
    return job


def failure(record: dict[str, Any]) -> dict[str, Any]:
    error = record["response"]["body"]["error"]
    assert isinstance(error, dict)
    return error


def test_every_request_gets_a_response(job: RunSettings) -> None:
    statistics = answer(job)
    got = [(r["custom_id"], r["response"]["status_code"]) for r in results(job.output)]
    assert got == [
        ("a", 200), ("b", 400), ("c", 200), ("a", 400), ("d", 400), (None, 400), ("e", 200),
    ]  # fmt: skip
    assert statistics.failed == {
        "duplicate_chat_id": 1, "invalid_json": 1, "invalid_value": 1, "missing_field": 1,
    }  # fmt: skip
    assert all(record["error"] is None for record in results(job.output))


def test_sample_file_has_valid_and_invalid_requests(job: RunSettings) -> None:
    sample = Path(__file__).parents[1] / "sample_inputs" / "openai_batch.jsonl"
    answer(replace(job, input=sample))
    statuses = [r["response"]["status_code"] for r in results(job.output)]
    assert statuses == [200, 200, 200, 400, 200, 400]


def test_answer_has_openais_shape(job: RunSettings) -> None:
    answer(job)
    record = results(job.output)[0]
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert list(record["response"]) == ["status_code", "request_id", "body"]
    completion = ChatCompletion.model_validate(record["response"]["body"], strict=True)
    assert completion.choices[0].message.content is not None
    assert completion.choices[0].message.content.startswith("one two")
    assert completion.model == EngineSettings().model, "the model that answered"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 3


def test_error_names_line_and_parameter(job: RunSettings) -> None:
    answer(job)
    _, tools, _, duplicate, url, torn, _ = results(job.output)
    assert failure(tools) == {
        "message": "tools[0].function is required",
        "type": "invalid_request_error",
        "param": "tools[0].function",
        "code": "missing_field",
        "line": 2,
    }
    assert failure(duplicate)["message"] == "custom_id 'a' was already used on an earlier line"
    assert (failure(duplicate)["param"], failure(duplicate)["line"]) == ("custom_id", 5)
    assert failure(url)["message"] == "url must be /v1/chat/completions or /v1/completions"
    assert failure(torn)["code"] == "invalid_json"


def test_check_finds_the_same_errors_as_a_run(job: RunSettings) -> None:
    answer(job)
    found = [item.error for item in check_input(job, None) if isinstance(item, Result)]
    written = results(job.output)
    assert found == [failure(r)["message"] for r in written if r["response"]["status_code"] != 200]


def only_error(job: RunSettings, line: object) -> tuple[str | None, str, str | None]:
    """The error of a line between two valid ones: id, message and field."""
    write(job, [request("first"), line, request("last")])
    items = list(check_input(job, None))
    assert [isinstance(item, Query) for item in items] == [True, False, True]
    bad = items[1]
    assert isinstance(bad, Result)
    return bad.chat_id, str(bad.error), bad.field


@pytest.mark.parametrize(
    ("change", "said", "field"),
    [
        ({"custom_id": None}, "custom_id must be a non-empty string or an integer", "custom_id"),
        ({"custom_id": ""}, "custom_id must be a non-empty string or an integer", "custom_id"),
        ({"custom_id": 7.5}, "custom_id must be a non-empty string or an integer", "custom_id"),
        ({"method": "GET"}, "method must be POST", "method"),
        ({"url": "/v1/embeddings"}, "url must be /v1/chat/completions or /v1/completions", "url"),
        ({"body": "x"}, "body must be an object: the body of a request to the url", "body"),
        ({"priority": 1}, "priority is not supported", "priority"),
    ],
)
def test_invalid_line_fields_are_named(
    job: RunSettings, change: dict[str, Any], said: str, field: str
) -> None:
    assert only_error(job, request("b") | change)[1:] == (said, field)


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body"])
def test_every_line_field_is_required(job: RunSettings, name: str) -> None:
    line = request("b")
    del line[name]
    assert only_error(job, line)[1:] == (f"{name} is required", name)


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [TOOL]},
        {"top_logprobs": 99},
        {"temperature": -1},
        {"messages": []},
        {"max_tokens": 0},
    ],
)
def test_body_is_validated_like_a_server_request(job: RunSettings, body: dict[str, Any]) -> None:
    line = request("b", **body)
    with pytest.raises(QueryError) as caught:
        parse_completion(line["body"], QueryDefaults(), "b")
    assert only_error(job, line) == ("b", str(caught.value), caught.value.field)


def test_streaming_is_rejected(job: RunSettings) -> None:
    line = request("b", stream=True)
    assert only_error(job, line) == ("b", "stream cannot be true in a batch", "stream")


def test_model_name_is_ignored(job: RunSettings) -> None:
    """vLLM's files may omit it, and OpenAI's name models that are not available here."""
    nameless = request("b")
    del nameless["body"]["model"]
    write(job, [request("a", model="o3"), nameless, request("c", model="m")])
    assert answer(job).num_answered == 3


def test_formats_must_not_be_mixed(job: RunSettings) -> None:
    own = {"chat_id": "x", "user_prompt": "Hi"}
    _, said, _ = only_error(job, own)
    assert "the file is in OpenAI's batch format" in said
    write(job, [own, request("b"), own | {"chat_id": "y"}])
    _, error, _ = check_input(job, None)
    assert isinstance(error, Result)
    assert "the file is in smol's own" in str(error.error)


INVALID_FIRST_LINES = [
    "oops, a log line",
    "{}",
    "[]",
    "null",
    '{"custom_id": "a", "method": "POST"',
    '{"chat_id": "a", "user_prompt"',
    {"method": "POST", "url": "/v1/chat/completions", "body": {}},
    {"custom_id": "a", "body": None},
    {"chat_id": "", "user_prompt": "Hi"},
]


@pytest.mark.parametrize("first", INVALID_FIRST_LINES)
def test_an_invalid_first_line_does_not_decide_the_format(job: RunSettings, first: object) -> None:
    """One bad line used to make every line after it an error of the other format."""
    answer(write(job, [first, request("b"), request("c")]))
    assert [r["response"]["status_code"] for r in results(job.output)] == [400, 200, 200]
    own = [{"chat_id": name, "user_prompt": "Hi"} for name in "bc"]
    answer(replace(write(job, [first, *own]), overwrite=True))
    assert ["error" in record for record in results(job.output)] == [True, False, False]


def test_without_a_valid_line_the_majority_decides_the_format(job: RunSettings) -> None:
    wish = {"temperature": -1}
    answer(write(job, ["{}", request("a", **wish), request("b", **wish), {"chat_id": "c"}]))
    assert [record["custom_id"] for record in results(job.output)] == [None, "a", "b", None]


def test_an_integer_custom_id_is_returned_as_its_text(job: RunSettings) -> None:
    answer(write(job, [request(7), request(8, temperature=-1)]))
    assert [record["custom_id"] for record in results(job.output)] == ["7", "8"]


def test_extra_columns_with_openai_names_do_not_select_the_batch_format(job: RunSettings) -> None:
    line = {"chat_id": "a", "user_prompt": "Hi", "url": "x", "body": "y"}
    job = replace(job, defaults=QueryDefaults(extra_fields="keep"))
    answer(write(job, [line]))
    assert results(job.output)[0]["metadata"] == {"url": "x", "body": "y"}


def test_custom_id_seeds_sampling_like_chat_id(job: RunSettings, tmp_path: Path) -> None:
    answer(write(job, [request("a")]))
    own = replace(job, output=tmp_path / "own.jsonl")
    answer(write(own, [{"chat_id": "a", "messages": MESSAGES}]))
    [batch], [line] = results(job.output), results(own.output)
    assert batch["response"]["body"]["choices"][0]["message"]["content"] == line["response"]


def test_equal_runs_give_equal_bytes_and_other_seeds_other_ids(job: RunSettings) -> None:
    answer(job)
    again = replace(job, output=job.output.with_name("again.jsonl"))
    answer(again)
    assert again.output.read_bytes() == job.output.read_bytes()
    ids = [r["id"] for r in results(job.output)]
    assert len(set(ids)) == len(ids)
    other = replace(again, seed=6, overwrite=True)
    answer(other)
    assert not {r["id"] for r in results(other.output)} & set(ids)


def test_lines_accept_schemas_logprobs_and_n(job: RunSettings, tiny_folder: Path) -> None:
    """A line accepts whatever /v1 accepts in a body."""
    schema = {"type": "integer", "minimum": 0, "maximum": 99}
    held = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    engine = EngineSettings(str(tiny_folder), dtype="float32", max_batch_size=4, kv_cache_mb=64)
    lines = [
        request("a", response_format=held, n=3, temperature=1, logprobs=True, top_logprobs=2),
        request("b", response_format=held, max_tokens=1, stop="x"),
        request("c", response_format={"type": "json_object"}, max_tokens=1),
    ]
    answer(replace(write(job, lines), engine=engine), open_local)
    several, stopped, cut = results(job.output)
    completion = ChatCompletion.model_validate(several["response"]["body"], strict=True)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        assert 0 <= int(str(choice.message.content)) <= 99
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content[0].top_logprobs) == 2
    ends = [line["response"]["body"]["choices"][0] for line in (stopped, cut)]
    assert [end["finish_reason"] for end in ends] == ["length", "length"]
    assert ends[1]["message"]["content"].startswith("{"), "as OpenAI returns JSON that is cut off"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": json.dumps(SCHEMA)},
        {"json_schema": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
    ],
)
def test_schema_may_be_given_as_other_servers_take_it(body: dict[str, Any]) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    expected, query = [
        parse_completion(request(**each)["body"], QueryDefaults(), "a").query
        for each in ({"response_format": wrapped}, body)
    ]
    assert query.format == expected.format


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "schema": 5}}, "response_format.schema"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"json_schema": "[]"}, "json_schema"),
        ({"json_schema": SCHEMA, "grammar": 'root ::= "a"'}, "json_schema"),
    ],
)
def test_an_invalid_schema_is_rejected_by_its_path(body: dict[str, Any], path: str) -> None:
    with pytest.raises(QueryError) as caught:
        parse_completion(request(**body)["body"], QueryDefaults(), "a")
    assert caught.value.field == path


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"content": {"type": "text", "text": "Hi"}}, "messages[0].content"),
        ({"content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"content": [{"type": "text", "text": "Hi", "cache_control": {"type": "a"}}]}, None),
        ({"content": "Hi", "reasoning_details": [{"type": "a"}]}, None),
    ],
)
def test_messages_are_accepted_or_rejected_by_their_path(
    message: dict[str, Any], path: str | None
) -> None:
    """A content of a wrong type was at `messages[0].content.str`, a name of pydantic."""
    body = request("a")["body"] | {"messages": [{"role": "user"} | message]}
    if path is None:
        assert parse_completion(body, QueryDefaults(), "a").query.messages[0].content == "Hi"
        return
    with pytest.raises(QueryError) as caught:
        parse_completion(body, QueryDefaults(), "a")
    assert caught.value.field == path


def test_n_above_one_samples_at_openais_temperature(job: RunSettings) -> None:
    """Only in OpenAI's format, and only if no temperature is given."""
    left_open, told = [
        parse_completion(request(**body)["body"], QueryDefaults(), "a").query
        for body in ({"n": 2}, {"n": 2, "temperature": 1})
    ]
    assert left_open == told
    assert only_error(job, request("b", n=2, temperature=0))[2] == "n"
    lines = [request("a", n=2), request("b", n=2, temperature=0.5), request("c", logprobs=True)]
    drawn = [item.sampling.temperature for item in check_input(write(job, lines), None)
             if isinstance(item, Query)]  # fmt: skip
    assert drawn == [1.0, 0.5, 0.0]
    [own] = check_input(write(job, [{"chat_id": "a", "user_prompt": "Hi", "n": 2}]), None)
    assert isinstance(own, Result)
    assert own.field == "n"


def smol_run(job: RunSettings, *args: str) -> int:
    """Run the command; returns its exit code."""
    given = ["run", str(job.input), "-o", str(job.output), "--seed", "5", *args]
    return CliRunner().invoke(app, given, obj=EchoBackend).exit_code


def test_temperature_option_applies_to_n_above_one(job: RunSettings) -> None:
    """At temperature 0 such a query is an error, so that run must not resume a sampled one."""
    write(job, [request("a", n=2)])
    assert smol_run(job) == smol_run(job) == 0
    assert smol_run(job, "--temperature", "0") == 2
    assert smol_run(job, "--temperature", "0", "--overwrite") == 3
    assert failure(results(job.output)[0])["param"] == "n"
    assert smol_run(job, "--temperature", "0.7", "--overwrite") == 0
    assert load_manifest(job.output).generation["several_temperature"] == 0.7


def test_temperature_of_several_answers_does_not_affect_own_format(job: RunSettings) -> None:
    write(job, [{"chat_id": "a", "user_prompt": "Hi"}])
    assert smol_run(job) == smol_run(job, "--temperature", "0") == 0


def test_table_of_an_openai_batch_has_the_columns_of_a_result(job: RunSettings) -> None:
    """The whole envelope stood in `response`, and every other column was empty."""
    table = job.output.with_name("t.csv")
    answer(replace(job, output=job.output.with_name("t.csv.jsonl"), table=table))
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["chat_id"] for row in rows] == ["a", "b", "c", "a", "d", "", "e"]
    assert rows[0]["response"].startswith("one two")
    assert (rows[0]["finish_reason"], rows[0]["prompt_tokens"], rows[0]["line"]) == (
        "stop",
        "1",
        "1",
    )
    assert [row["error_code"] for row in rows].count("") == 3
    assert (rows[4]["field"], rows[4]["line"]) == ("url", "6")


def test_timings_are_optional(job: RunSettings) -> None:
    answer(replace(job, with_timings=True))
    assert results(job.output)[0]["timings"]["total_s"] == 0.02


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/fd")
def test_requests_are_read_from_a_pipe_and_written_to_stdout(
    job: RunSettings, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The format of a stream is detected from its first line."""
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(job.input.read_bytes())
    answer(replace(job, input=Path(f"/dev/fd/{read_end}"), output=Path("-")))
    os.close(read_end)
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b", "c", "a", "d", None, "e"]


@pytest.mark.parametrize("is_split", [False, True])
def test_truncated_output_is_completed_identically(
    job: RunSettings, monkeypatch: pytest.MonkeyPatch, is_split: bool
) -> None:
    """Both files end up the same for many truncations, including `created`."""
    monkeypatch.setattr("os.fsync", lambda fd: None)  # hundreds of runs
    answer(job)
    running = job.output.read_bytes()
    errors = job.output.with_name("bad.jsonl") if is_split else None
    job = replace(job, errors=errors, overwrite=True)
    answer(job)
    whole, bad = job.output.read_bytes(), errors.read_bytes() if errors else b""
    assert len(whole) + len(bad) == len(running)
    unfinished = replace(load_manifest(job.output), statistics=None)
    job = replace(job, overwrite=False)
    for num_bytes in range(0, len(running), 61):
        job.output.write_bytes(running[:num_bytes])
        if errors is not None:
            errors.unlink()
        save_manifest(unfinished, job.output)
        statistics = answer(job)
        assert statistics.num_lines == len(LINES)
        assert job.output.read_bytes() == whole
        assert errors is None or errors.read_bytes() == bad


def test_created_is_the_inputs_modification_time_at_the_first_run(job: RunSettings) -> None:
    os.utime(job.input, (0, 1_700_000_000))
    answer(replace(job, limit=1))
    os.utime(job.input, (0, 1_800_000_000))
    answer(job)
    answered = [r for r in results(job.output) if r["response"]["status_code"] == 200]
    assert {r["response"]["body"]["created"] for r in answered} == {1_700_000_000}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)
FIELDS = {
    "custom_id": JSON | st.sampled_from(["a", "b", ""]),
    "method": JSON | st.just("POST"),
    "url": JSON | st.just("/v1/chat/completions"),
    "body": JSON | st.fixed_dictionaries({}, optional={"messages": JSON, "model": JSON}),
    "chat_id": JSON,
    "error": JSON,
}


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.fixed_dictionaries({}, optional=FIELDS), max_size=8))
def test_garbage_lines_never_end_a_run(job: RunSettings, lines: list[Any]) -> None:
    """Each line gets one response, and a resume can read all of them back."""
    write(job, [request("first"), *lines])
    answer(replace(job, overwrite=True))
    records = [
        json.loads(line, parse_constant=pytest.fail)
        for line in job.output.read_bytes().splitlines()
    ]
    assert len(records) == len(lines) + 1
    assert all(record["error"] is None for record in records)
    answer(job, no_backend)


@pytest.fixture
def split(job: RunSettings) -> RunSettings:
    """A complete run with `--errors`."""
    job = replace(job, errors=job.output.with_name("bad.jsonl"))
    answer(job)
    return job


def test_failed_lines_are_moved_to_the_errors_file(split: RunSettings) -> None:
    assert split.errors is not None
    assert [r["custom_id"] for r in results(split.output)] == ["a", "c", "e"]
    assert [r["custom_id"] for r in results(split.errors)] == ["b", "a", "d", None]
    before = split.output.stat().st_mtime_ns, split.errors.stat().st_mtime_ns
    statistics = answer(split, no_backend)
    assert (statistics.num_answered, statistics.num_lines) == (3, 7)
    after = split.output.stat().st_mtime_ns, split.errors.stat().st_mtime_ns
    assert after == before, "left untouched"


def test_own_format_supports_errors_file(job: RunSettings) -> None:
    errors = job.output.with_name("bad.jsonl")
    write(job, [{"chat_id": "a", "user_prompt": "x"}, {"chat_id": "b"}])
    answer(replace(job, errors=errors))
    assert [r["chat_id"] for r in results(job.output)] == ["a"]
    assert [r["chat_id"] for r in results(errors)] == ["b"]


def test_complete_output_can_be_split_later(job: RunSettings, split: RunSettings) -> None:
    late = replace(job, output=job.output.with_name("late.jsonl"))
    answer(late)
    late = replace(late, errors=job.output.with_name("late-bad.jsonl"))
    answer(late, no_backend)
    assert late.errors is not None
    assert split.errors is not None
    assert late.output.read_bytes() == split.output.read_bytes()
    assert late.errors.read_bytes() == split.errors.read_bytes()


def test_no_errors_file_without_failed_lines(job: RunSettings) -> None:
    errors = job.output.with_name("bad.jsonl")
    answer(replace(write(job, [request("a")]), errors=errors))
    assert not errors.exists()


def test_killed_split_is_completed(split: RunSettings) -> None:
    """Killed after either file was replaced, or before the manifest got its statistics."""
    assert split.errors is not None
    whole, bad = split.output.read_bytes(), split.errors.read_bytes()
    manifest = json.loads(manifest_path(split.output).read_bytes()) | {"report": None}
    both = sorted(
        (whole + bad).splitlines(keepends=True),
        key=lambda line: int(json.loads(line)["id"].rpartition("_")[2]),
    )
    for state in (b"".join(both), whole):
        split.output.write_bytes(state)
        manifest_path(split.output).write_text(json.dumps(manifest))
        answer(split, no_backend)
        assert (split.output.read_bytes(), split.errors.read_bytes()) == (whole, bad)
        assert load_manifest(split.output).statistics is not None


def test_split_run_can_be_extended(job: RunSettings, split: RunSettings) -> None:
    other = replace(job, output=job.output.with_name("o"), errors=job.output.with_name("e"))
    answer(replace(other, limit=4))
    with pytest.raises(BackendError):
        answer(other, lambda settings: DyingBackend(num_answers=0))
    answer(other)
    assert split.errors is not None
    assert other.errors is not None
    assert other.output.read_bytes() == split.output.read_bytes()
    assert other.errors.read_bytes() == split.errors.read_bytes()


def test_output_is_empty_if_every_line_failed(job: RunSettings) -> None:
    errors = job.output.with_name("bad.jsonl")
    job = replace(write(job, [request("a", tools=[TOOL])]), errors=errors)
    answer(job)
    assert job.output.read_bytes() == b""
    assert answer(job, no_backend).failed == {"missing_field": 1}


def test_errors_file_must_not_be_left_behind(split: RunSettings) -> None:
    for errors in (None, split.output.with_name("other.jsonl")):
        with pytest.raises(ResumeError, match=r"are in .*bad.jsonl; pass it as --errors"):
            answer(replace(split, errors=errors), no_backend)
    assert split.errors is not None
    split.errors.unlink()
    with pytest.raises(ResumeError, match="lacks results"):
        answer(split, no_backend)
    answer(replace(split, overwrite=True))
    assert len(results(split.errors)) == 4


def test_foreign_errors_file_is_rejected_and_kept(job: RunSettings) -> None:
    errors = job.output.with_name("bad.jsonl")
    errors.write_bytes(b"mine\n")
    job = replace(job, errors=errors)
    with pytest.raises(ResumeError, match=r"bad.jsonl exists"):
        answer(job, no_backend)
    answer(replace(job, errors=None))
    with pytest.raises(ResumeError, match=r"bad.jsonl exists"):
        answer(job, no_backend)
    assert errors.read_bytes() == b"mine\n"


def test_errors_file_must_not_be_another_file_of_the_run(job: RunSettings) -> None:
    for errors in (job.input, job.output, manifest_path(job.output), job.output.parent):
        with pytest.raises(UsageError):
            answer(replace(job, errors=errors), no_backend)
    split = replace(job, errors=job.output.with_name("e"))
    for stream in (replace(split, output=Path("-")), replace(split, input=Path("-"))):
        with pytest.raises(UsageError, match="--errors needs files"):
            answer(stream, no_backend)


def test_errors_file_must_not_be_a_pipe_or_device(job: RunSettings) -> None:
    """The file is replaced at the end, which would remove /dev/null."""
    pipe = job.output.with_name("pipe")
    os.mkfifo(pipe)
    for errors in (pipe, Path("/dev/null"), Path("-")):
        with pytest.raises(UsageError, match="must be a regular file"):
            answer(replace(job, errors=errors), no_backend)
    assert pipe.is_fifo()


def test_line_of_another_run_is_rejected(job: RunSettings) -> None:
    answer(replace(job, limit=1))
    foreign = results(job.output)[0] | {"id": "batch_req_0_2"}
    with job.output.open("ab") as file:
        file.write(json.dumps(foreign).encode() + b"\n")
    with pytest.raises(ResumeError, match="line 2 of"):
        answer(job, no_backend)


def test_run_killed_repeatedly_ends_with_the_same_bytes(job: RunSettings) -> None:
    """Both files equal those of an undisturbed run."""
    lines = [request(str(n)) if n % 9 else request(str(n), tools=[TOOL]) for n in range(400)]
    job.input.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    whole = replace(job, output=job.output.with_name("whole"), errors=job.output.with_name("bad"))
    torn = replace(whole, output=job.output.with_name("torn"), errors=job.output.with_name("off"))
    answer(whole)
    assert whole.errors is not None
    assert torn.errors is not None
    source, num_killed = random.Random(3), 0
    for _ in range(4):
        num_killed += answer_until_killed(torn, source.uniform(0, 0.15), 0.001) != 0
    answer(torn)
    assert num_killed > 0
    assert torn.output.read_bytes() == whole.output.read_bytes()
    assert torn.errors.read_bytes() == whole.errors.read_bytes()


def test_record_of_a_text_completion_is_converted() -> None:
    """Its choices have no message, which reports and tables used to expect."""
    choice = {"text": "Paris", "finish_reason": "stop", "logprobs": None}
    response = {"status_code": 200, "body": {"choices": [choice]}}
    record = {"id": "x", "custom_id": "1", "response": response, "error": None}
    assert smol_record(record) == {"chat_id": "1", "response": "Paris", "finish_reason": "stop"}
