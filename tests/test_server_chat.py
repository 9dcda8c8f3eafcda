"""/chat, /chat/batched and /generate_batch, over real sockets."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_tools import RunningServer, query, serving, tiny_engine

from smolcli.backends.local import open_local
from smolcli.batch.progress import LogProgress
from smolcli.batch.runner import run_file
from smolcli.settings import RunSettings

NDJSON = "application/x-ndjson"


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(open_local, tiny_engine(tiny_folder)) as running:
        yield running


def test_http_and_files_give_the_same_results(
    server: RunningServer, tiny_folder: Path, tmp_path: Path
) -> None:
    """A query has the same result in /chat, in a batch, in a stream and in a file."""
    queries = [
        query("What is gravity?", chat_id="1", metadata={"tag": "ü"}),
        query("Why is the sky blue?", chat_id="2", system_prompt="Be brief."),
        query("Draw", chat_id="3", temperature=1.0, seed=7, max_new_tokens=12),
        {"chat_id": "4"},
        query("Draw", chat_id="5", temprature=1.0),
        query("word " * 600, chat_id="6"),
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in queries), "utf-8")
    output = tmp_path / "results.jsonl"
    run_file(RunSettings(path, output, engine=tiny_engine(tiny_folder)), open_local, LogProgress())
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for line in lines:
        del line["line"]

    batch = server.post("/chat/batched", {"queries": queries}).json()
    assert batch["responses"] == lines
    stream = server.post("/chat/batched", {"queries": queries}, Accept=NDJSON).text
    in_order = sorted(map(json.loads, stream.splitlines()), key=lambda item: item.pop("index"))
    assert in_order == lines
    for asked, line in zip(queries, lines, strict=True):
        alone = server.post("/chat", asked)
        if "error" in line:
            assert alone.status_code == 400
            names = ("error", "error_code", "field")
            assert alone.json() == {name: line[name] for name in names if name in line}
        else:
            assert (alone.status_code, alone.json()) == (200, line)


def test_a_batch_reports_failed_queries(server: RunningServer) -> None:
    good, bad = query(), {"chat_id": "2"}
    whole = server.post("/chat/batched", {"queries": [good, good]})
    assert (whole.status_code, list(whole.json())) == (200, ["responses"])
    some, none = "Some queries failed but others succeeded", "All queries failed"
    for queries, message in (
        ([good, bad], some),
        ([bad, good, bad], some),
        ([bad], none),
        ([None, 3, "x", []], none),
    ):
        partial = server.post("/generate_batch", {"queries": queries})
        assert partial.status_code == 200
        assert len(partial.json()["responses"]) == len(queries)
        assert partial.json()["partial_success"] is True
        assert partial.json()["message"] == message


@pytest.mark.parametrize(
    ("path", "value", "code", "sentence"),
    [
        ("/chat", {}, "missing_field", "chat_id is required and cannot be empty"),
        ("/chat", {"chat_id": ""}, "missing_field", "chat_id is required and cannot be empty"),
        ("/chat", {"chat_id": "1"}, "missing_field", "user_prompt is required and cannot be empty"),
        (
            "/chat",
            {"chat_id": "1", "user_prompt": " "},
            "missing_field",
            "user_prompt is required and cannot be empty",
        ),
        ("/chat", [], "not_an_object", "a query must be a JSON object, not an array"),
        (
            "/chat/batched",
            {},
            "missing_field",
            "queries array required and must be non-empty",
        ),
        (
            "/chat/batched",
            {"queries": []},
            "missing_field",
            "queries array required and must be non-empty",
        ),
        (
            "/generate_batch",
            {"queries": "x"},
            "invalid_value",
            "queries array required and must be non-empty",
        ),
        ("/chat/batched", [], "not_an_object", "a batch must be a JSON object"),
        ("/chat/batched", {"querys": []}, "unknown_field", "unknown field 'querys'"),
    ],
)
def test_an_invalid_request_is_explained(
    server: RunningServer, path: str, value: Any, code: str, sentence: str
) -> None:
    response = server.post(path, value)
    assert response.status_code == 400
    assert (response.json()["error_code"], response.json()["error"]) == (code, sentence)


def test_a_byte_order_mark_is_accepted(server: RunningServer) -> None:
    body = codecs.BOM_UTF8 + json.dumps(query()).encode()
    identity = JSON | {"Content-Encoding": "Identity"}
    for headers in (JSON, identity, {"Content-Type": "application/vnd.api+json; charset=utf-8"}):
        assert server.client.post("/chat", content=body, headers=headers).status_code == 200


def test_every_error_is_json(server: RunningServer) -> None:
    """Never HTML, never a traceback."""
    client = server.client
    errors = [
        (client.post("/chat", content=b"{", headers=JSON), 400, "invalid_json"),
        (client.post("/chat", content=b'{"a":1,"a":2}', headers=JSON), 400, "invalid_json"),
        (client.post("/chat", content=b"\xff", headers=JSON), 400, "invalid_json"),
        (client.post("/chat", content=b"{}"), 415, "unsupported_media_type"),
        (client.post("/chat", data={"chat_id": "1"}), 415, "unsupported_media_type"),
        (client.get("/chat"), 405, "method_not_allowed"),
        (client.options("/chat"), 405, "method_not_allowed"),
        (client.put("/v1/models"), 405, "method_not_allowed"),
        (client.get("/nope"), 404, "not_found"),
        (client.get("/page/../app.py"), 404, "not_found"),
        (client.get("/page/%2e%2e%2fapp.py"), 404, "not_found"),
        (
            client.post("/chat", content=b"{}", headers=JSON | {"Content-Encoding": "gzip"}),
            415,
            "unsupported_media_type",
        ),
    ]
    for response, status, code in errors:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        error = response.json()
        assert code in (error.get("error_code"), error["error"] and _code(error)), error
    assert errors[5][0].headers["allow"] == "POST"


JSON = {"Content-Type": "application/json"}


def _code(error: dict[str, Any]) -> Any:
    """The code of an error in OpenAI's shape, None for other shapes."""
    return error["error"]["code"] if isinstance(error["error"], dict) else None


def test_chat_ids_may_repeat_and_be_integers(server: RunningServer) -> None:
    response = server.post("/chat/batched", {"queries": [query(chat_id=7), query(chat_id="7")]})
    first, second = response.json()["responses"]
    assert first == second
    assert first["chat_id"] == "7"
