"""Requests that are rejected before the application sees them are reported like any other error."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

import pytest
from fakes import EchoBackend
from server_tools import RunningServer, chat_request, eventually, http, serving

from smolcli.settings import EngineSettings

LIMIT = 100_000
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(lambda _: EchoBackend(), EngineSettings(), max_body_bytes=LIMIT) as running:
        yield running


@dataclass
class Reply:
    """A response, and whether the server closed the connection after it."""

    status: int
    headers: dict[str, str]
    body: Any
    is_closed: bool


def exchange(server: RunningServer, *pieces: bytes) -> Reply:
    """Send the pieces of a request and read one response."""
    with server.connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
        response = HTTPResponse(connection)
        response.begin()
        body = json.loads(response.read())
        headers = {name.lower(): value for name, value in response.getheaders()}
        is_closed = headers.get("connection") == "close" and connection.recv(1) == b""
        return Reply(response.status, headers, body, is_closed)


def raw(path: str, *lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


MALFORMED = {
    "two equal lengths": (["Host: x", "Content-Length: 3", "Content-Length: 3"], b"abc"),
    "two lengths": (["Host: x", "Content-Length: 3", "Content-Length: 4"], b"abcd"),
    "length and coding": (
        ["Host: x", "Content-Length: 5", "Transfer-Encoding: chunked"],
        b"0\r\n\r\n",
    ),
    "coding and length": (
        ["Host: x", "transfer-encoding: chunked", "content-length: 5"],
        b"0\r\n\r\n",
    ),
    "empty coding and length": (["Host: x", "Transfer-Encoding:", "Content-Length: 2"], b"{}"),
    "empty coding": (["Host: x", "Transfer-Encoding:"], b"2\r\n{}\r\n0\r\n\r\n"),
    "length of 5,000 digits": (["Host: x", "Content-Length: " + "9" * 5000], b""),
    "endless chunk size": (["Host: x", "Transfer-Encoding: chunked"], b"0" * 5000),
    "endless trailer": (["Host: x", "Transfer-Encoding: chunked"], b"0\r\nX: " + b"y" * 70_000),
    "chunked twice": (["Host: x", "Transfer-Encoding: chunked, chunked"], b"0\r\n\r\n"),
    "two codings": (
        ["Host: x", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        b"0\r\n\r\n",
    ),
    "two hosts": (["Host: x", "Host: y", "Content-Length: 2"], b"{}"),
    "two equal hosts": (["Host: x", "Host: x", "Content-Length: 2"], b"{}"),
    "no host": (["Content-Length: 2"], b"{}"),
    "host with a path": (["Host: x/y", "Content-Length: 2"], b"{}"),
    "header without a name": (["Host: x", ": y"], b""),
    "space before the colon": (["Host: x", "Content-Length : 2"], b"{}"),
}


@pytest.mark.parametrize(("lines", "body"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])
def test_malformed_framing_gets_400_and_closes_the_connection(
    server: RunningServer, path: str, lines: list[str], body: bytes
) -> None:
    smuggled = http("/health", b"", method="GET")
    reply = exchange(server, raw(path, JSON, *lines, body=body) + smuggled)
    assert (reply.status, reply.is_closed) == (400, True)
    if path.startswith("/v1"):
        assert reply.body["error"]["code"] == "bad_request"
        assert reply.body["error"]["type"] == "invalid_request_error"
    else:
        assert reply.body["error_code"] == "bad_request"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v1/models HTTP/1.1\nHost: x\n\n",
        b"GET /v1/models HTTP/1.1\n",
        b"GET /v1/models\n",
        b"GET /v1/models HTTP/1.1\rHost: x\r\r",
        b"\r\nGET /v1/models HTTP/1.1\r\nHost: x\n\n",
        raw("/v1/models", "Host: x", "Transfer-Encoding: chunked", body=b"2\n{}\n0\n\n"),
        raw("/v1/models", "Host: x", "Transfer-Encoding: chunked", body=b"0\r\nX: y\n\n"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_lines_that_do_not_end_in_cr_lf_are_rejected_at_once(
    server: RunningServer, data: bytes, size: int
) -> None:
    """The server waited for a CR LF until the request timed out."""
    reply = exchange(server, *(data[i : i + size] for i in range(0, len(data), size)))
    assert (reply.status, reply.is_closed) == (400, True)
    assert "lines must end in CR LF" in reply.body["error"]["message"]


@pytest.mark.parametrize(
    "line",
    [
        "GET http://[ HTTP/1.1",
        "GET http://[::1/ HTTP/1.1",
        "GET /health HTTP/2.0",
        "PRI * HTTP/2.0",
        "GET /health HTTP/1.2",
        "GET /health",
    ],
)
def test_a_malformed_request_line_gets_400_and_closes_the_connection(
    server: RunningServer, line: str
) -> None:
    reply = exchange(server, f"{line}\r\nHost: x\r\n\r\n".encode())
    assert (reply.status, reply.body["error_code"], reply.is_closed) == (400, "bad_request", True)
    assert "x-request-id" in reply.headers


def test_a_client_of_https_is_rejected_at_once(server: RunningServer) -> None:
    """It waited a minute for the server to drop the connection."""
    reply = exchange(server, b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0")
    assert (reply.status, reply.is_closed) == (400, True)
    assert reply.body["error"].endswith("the server speaks HTTP, not HTTPS")


def test_http_1_0_needs_no_host_and_allows_no_transfer_encoding(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.0 200")
    chunked = b"POST /chat HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert exchange(server, chunked).status == 400


def test_a_body_above_the_limit_is_rejected_while_it_is_sent(server: RunningServer) -> None:
    """The client sends far more than the socket buffers hold, and still reads the response."""
    head = raw("/v1/chat/completions", "Host: x", JSON, "Content-Length: 40000000")
    reply = exchange(server, head, b"x" * 40_000_000)
    assert (reply.status, reply.is_closed) == (413, True)
    assert reply.body["error"]["message"].endswith("larger than the limit of 100,000 bytes")
    assert reply.body["error"]["code"] == "too_large"


@pytest.mark.parametrize("received", [b"", b"3\r\nabc\r\n"])
def test_a_chunk_above_the_limit_is_rejected_from_its_size(
    server: RunningServer, received: bytes
) -> None:
    """It was buffered up to the limit first."""
    head = raw("/chat", "Host: x", JSON, "Transfer-Encoding: chunked", body=received)
    reply = exchange(server, head + b"%x\r\n" % (LIMIT + 1))
    assert (reply.status, reply.body["error_code"], reply.is_closed) == (413, "too_large", True)


def test_a_body_of_the_limit_is_accepted(server: RunningServer) -> None:
    fixed = json.dumps({"chat_id": "1", "user_prompt": "Hi", "system_prompt": ""}).encode()
    assert exchange(server, http("/chat", fixed.ljust(LIMIT), JSON)).status == 200
    assert exchange(server, http("/chat", fixed.ljust(LIMIT + 1), JSON)).status == 413


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, b"HTTP/1.1 400 "), (LIMIT, b"HTTP/1.1 100 "), (LIMIT + 1, b"HTTP/1.1 413 ")],
)
def test_100_continue_invites_only_a_body_within_the_limit(
    server: RunningServer, length: int, expected: bytes
) -> None:
    """A request without a body was invited to send one, and never answered."""
    head = raw("/chat", "Host: x", JSON, "Expect: 100-continue", f"Content-Length: {length}")
    with server.connect() as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(expected)


def test_headers_above_the_limit_are_rejected(server: RunningServer) -> None:
    head = raw("/v1/chat/completions", "Host: x", "X-Padding: " + "x" * 400_000)
    reply = exchange(server, head)
    assert (reply.status, reply.body["error"]["code"]) == (431, "too_large")
    assert "262,144 bytes" in reply.body["error"]["message"]


class Records(logging.Handler):
    """Collects the records of one request in the access log."""

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "fields", {}).get("request_id") == self.request_id:
            self.records.append(record)


def num_bad_requests(server: RunningServer) -> float:
    metrics = server.client.get("/metrics").text
    counted = re.search(r'^smol_request_errors_total{code="bad_request"} (.+)$', metrics, re.M)
    return float(counted[1]) if counted else 0.0


@pytest.mark.parametrize(
    ("request_line", "message"),
    [("POST /v1/chat/completions HTTP/1.1", "POST /v1/chat/completions"), ("nonsense", "? /")],
)
def test_a_rejection_is_logged_and_counted_with_a_request_id(
    server: RunningServer, request_line: str, message: str
) -> None:
    num_before = num_bad_requests(server)
    access_log, handler = logging.getLogger("smolcli.server.access_log"), Records("id-7")
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    try:
        lines = [request_line, "X-Request-Id: id-7", "Content-Length: 3", "Content-Length: 3"]
        reply = exchange(server, "\r\n".join([*lines, "", ""]).encode())
        eventually(lambda: len(handler.records) == 1)
    finally:
        access_log.removeHandler(handler)
    assert reply.headers["x-request-id"] == "id-7"
    (record,) = handler.records
    assert record.getMessage() == message
    assert record.fields["status"] == 400
    assert record.fields["error_code"] == "bad_request"
    assert num_bad_requests(server) == num_before + 1


def test_the_connection_of_a_rejected_request_is_not_reused(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(raw("/chat", "Content-Length: 2", body=b"{}") + chat_request())
        received = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
    assert received.count(b"HTTP/1.1") == 1
