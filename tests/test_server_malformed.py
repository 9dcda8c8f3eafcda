"""Malformed requests: the server answers with JSON or not at all, and keeps running."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_tools import FaultyBackend, RunningServer, http, serving, tiny_engine

# All examples of a test share the fixture's server on purpose.
bounded = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = "Content-Type: application/json"
PATHS = st.sampled_from(["/chat", "/chat/batched", "/generate_batch", "/v1/chat/completions"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["chat_id", "user_prompt", "queries", "messages", "model", "stop", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(FaultyBackend().open, tiny_engine(tiny_folder), max_body_bytes=100_000) as running:
        yield running


def exchange(server: RunningServer, data: bytes) -> bytes:
    """Send bytes and return the first response, or b"" if the server waits for more bytes."""
    is_head = data.startswith(b"HEAD ")
    with server.connect() as connection:
        connection.sendall(data)
        connection.settimeout(0.2)
        received = b""
        with suppress(ConnectionResetError, TimeoutError):
            while not is_complete(received, is_head) and (piece := connection.recv(65536)):
                received += piece
                connection.settimeout(30)
        return received


def is_complete(response: bytes, is_head: bool) -> bool:
    """Whether a response contains as many bytes as its Content-Length announces.

    Responses to HEAD and "100 Continue" have no body.
    """
    head, separator, body = response.partition(b"\r\n\r\n")
    if is_head or response.startswith(b"HTTP/1.1 100"):
        return bool(separator)
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    return bool(separator and length and len(body) >= int(length[1]))


def check_answer(answer: bytes) -> None:
    """Check that a response, if any, is JSON and does not report a server error."""
    if not answer:
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status not in (500, 502), answer
    assert b"Content-Type: application/json" in head, answer
    assert b"Traceback" not in body
    json.loads(body.partition(b"\n")[0])


@bounded
@given(path=PATHS, value=VALUES)
def test_any_json_value_gets_a_json_answer(server: RunningServer, path: str, value: Any) -> None:
    response = server.client.post(
        path, content=json.dumps(value).encode(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code in (200, 400, 404)
    assert response.json()


@bounded
@given(path=PATHS, body=st.binary(max_size=200))
def test_body_that_is_not_json_is_rejected(server: RunningServer, path: str, body: bytes) -> None:
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"


@bounded
@given(data=st.binary(min_size=1, max_size=300))
def test_any_bytes_get_a_json_answer_or_none(server: RunningServer, data: bytes) -> None:
    check_answer(exchange(server, data + b"\r\n\r\n"))


HEADERS = st.sampled_from(
    [
        "Content-Length: -1",
        "Content-Length: 99999999999",
        "Content-Length: x",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip",
        "Expect: 100-continue",
        "Connection: close",
        "Content-Encoding: gzip",
        "Accept: application/x-ndjson",
        "Accept: \x00",
        "Authorization: Bearer \xff",
        "X-Request-Id: \xe9",
        "Host:",
        "Host: a b",
        "Bad Header",
        ": x",
        "Range: bytes=0-1",
        "X-Forwarded-For: 1.2.3.4",
        JSON,
    ]
)


@bounded
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get"]),
    path=st.sampled_from(
        ["/chat", "/health", "*", "http://x/chat", "/%ff", "/\xe9", "/v1/models/"]
    ),
    headers=st.lists(HEADERS, max_size=4),
    body=st.sampled_from([b"", b"{}", b"0\r\n\r\n", b"zz\r\n", b"5\r\n{}"]),
)
def test_any_request_head_gets_a_json_answer_or_none(
    server: RunningServer, method: str, path: str, headers: list[str], body: bytes
) -> None:
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *headers, "", ""])
    answer = exchange(server, head.encode("latin-1") + body)
    if method != "HEAD" and not answer.startswith(b"HTTP/1.1 100"):
        check_answer(answer)


def test_errors_are_short_and_say_what_is_missing(server: RunningServer) -> None:
    missing = server.client.get("/" + "a" * 50_000)
    assert (missing.status_code, len(missing.content) < 1000) == (404, True)
    empty = server.client.post("/chat", headers={"Content-Type": "application/json"})
    assert (empty.status_code, empty.json()["error_code"]) == (400, "invalid_json")
    assert empty.json()["error"] == "invalid JSON: the request body is empty"


def test_server_answers_after_malformed_connections(server: RunningServer) -> None:
    for data in (b"\x16\x03\x01\x02\x00", b"GET", http("/chat", b"[" * 50_000, JSON)):
        check_answer(exchange(server, data))
    assert server.ask().status_code == 200
