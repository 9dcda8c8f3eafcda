"""Streams: headers at once, signs of life while a query waits, and reusable connections."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse

import pytest
from fakes import EchoBackend, HeldBackend, echo
from server_tools import TIMEOUT_S, RunningServer, eventually, query, serving

from smolcli.settings import EngineSettings
from smolcli.types import Message, Query

NDJSON = "application/x-ndjson"
COMPLETION = {
    "model": EngineSettings().model,
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
}


@pytest.fixture
def held() -> HeldBackend:
    return HeldBackend()


@pytest.fixture
def server(held: HeldBackend) -> Iterator[RunningServer]:
    """A server whose queries wait until the test answers them; a gateway needs no warm-up."""
    with serving(lambda _: held, EngineSettings(), is_gateway=True) as running:
        yield running


def post(connection: HTTPConnection, path: str, body: object, **headers: str) -> HTTPResponse:
    headers = {"Content-Type": "application/json"} | headers
    connection.request("POST", path, json.dumps(body), headers)
    return connection.getresponse()


def connect(server: RunningServer) -> HTTPConnection:
    return HTTPConnection(*server.address, timeout=TIMEOUT_S)


def test_a_waiting_stream_sends_headers_comments_and_then_the_answer(
    server: RunningServer, held: HeldBackend
) -> None:
    """Proxies and clients used to time out, as nothing was sent before the first token."""
    connection = connect(server)
    response = post(connection, "/v1/chat/completions", COMPLETION)
    assert response.status == 200
    assert json.loads(response.readline().removeprefix(b"data: "))["choices"][0]["delta"] == {
        "role": "assistant",
        "content": "",
    }
    assert response.readline() == b"\n"
    assert [response.readline(), response.readline()] == [b": keep-alive\n", b"\n"]
    held.futures[0].set_result(echo(Query("1", (Message("user", "Hi"),))))
    lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    connection.close()


def test_a_batch_stream_sends_headers_before_any_result(
    server: RunningServer, held: HeldBackend
) -> None:
    connection = connect(server)
    response = post(connection, "/chat/batched", {"queries": [query()]}, Accept=NDJSON)
    assert (response.status, response.headers["Content-Type"]) == (200, NDJSON)
    held.futures[0].set_result(echo(Query("1", (Message("user", "Hi"),))))
    assert json.loads(response.read())["index"] == 0
    connection.close()


@pytest.mark.parametrize(
    ("path", "body", "accept"),
    [
        ("/v1/chat/completions", COMPLETION, "text/event-stream"),
        ("/chat/batched", {"queries": [query()]}, NDJSON),
    ],
)
def test_a_connection_is_reused_after_a_stream(path: str, body: object, accept: str) -> None:
    with serving(lambda _: EchoBackend(), EngineSettings()) as server:
        connection = connect(server)
        for _ in range(3):
            response = post(connection, path, body, Accept=accept)
            assert response.headers["Transfer-Encoding"] == "chunked"
            assert "Connection" not in response.headers
            assert response.read()
            assert connection.sock is not None, "the server closed the connection"
        assert post(connection, path, body, Accept=accept, Connection="close").read()
        assert connection.sock is None
        connection.close()


def test_an_http_1_0_stream_ends_with_the_connection() -> None:
    body = json.dumps({"queries": [query()]}).encode()
    lines = ["POST /chat/batched HTTP/1.0", f"Content-Length: {len(body)}", f"Accept: {NDJSON}"]
    lines.append("Content-Type: application/json")
    with (
        serving(lambda _: EchoBackend(), EngineSettings()) as server,
        server.connect() as connection,
    ):
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert json.loads(received.partition(b"\r\n\r\n")[2])["index"] == 0


def test_a_client_that_disconnects_from_a_waiting_stream_frees_its_slot(
    server: RunningServer, held: HeldBackend
) -> None:
    connection = connect(server)
    post(connection, "/v1/chat/completions", COMPLETION).readline()
    connection.sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: held.futures[0].cancelled())
    connection.close()
