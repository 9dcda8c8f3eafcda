"""Connection timeouts: how long an idle or slow client may hold a connection."""

import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from server_tools import http
from waitress.server import create_server

from smolcli.server.channel import (
    IDLE_TIMEOUT_S,
    LINGER_TIMEOUT_S,
    RECEIVE_TIMEOUT_S,
    SEND_TIMEOUT_S,
    TRANSFER_RATE,
    Channel,
)
from smolcli.server.service import SEND_HEADERS

HALF = b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Slow:"


class Recorder(Channel):
    """Records what is sent at once."""

    def send(self, data: bytes, do_close: bool = True) -> int:
        num_sent = super().send(data, do_close)
        self.__dict__.setdefault("sent", []).append(bytes(data)[:num_sent])
        return num_sent


@dataclass
class Connection:
    """A channel of a server that is never polled, and the client's end of its socket."""

    channel: Channel
    client: socket.socket

    def is_closed_at(self, when: float) -> bool:
        self.channel.close_if_overdue(when)
        return self.channel.will_close

    def send(self, data: bytes) -> None:
        self.client.sendall(data)
        self.channel.handle_read()


@pytest.fixture
def connection() -> Iterator[Connection]:
    with (
        closing(create_server(answer, listen="127.0.0.1:0", threads=0, map={})) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        accepted, address = listener.accept()
        channel = Recorder(server, accepted, address, server.adj, map={})
        yield Connection(channel, client)
        channel.handle_close()


def answer(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    if (path := environ["PATH_INFO"]).startswith("/stream"):
        start_response("200 OK", [])
        if path == "/stream/headers":
            environ[SEND_HEADERS]()
        return iter([b"first", b"second"])
    body = b"x" * int(path[1:])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body or b"excess"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/3", [b"HTTP/1.1 200 OK.*\r\n\r\nxxx"]),
        ("/0", [b"HTTP/1.1 200 OK.*\r\n\r\n"]),
        ("/stream", [b"HTTP/1.1 200 OK.*\r\n\r\n5\r\nfirst\r\n", b"6\r\nsecond\r\n"]),
        (
            "/stream/headers",
            [b"HTTP/1.1 200 OK.*\r\n\r\n", b"5\r\nfirst\r\n", b"6\r\nsecond\r\n"],
        ),
    ],
)
def test_headers_are_sent_together_with_the_first_piece(
    connection: Connection, path: str, expected: list[bytes]
) -> None:
    """Waitress sends them by themselves, which wakes the client twice."""
    connection.send(http(path, b"", method="GET"))
    connection.channel.service()
    sent = vars(connection.channel)["sent"]
    if path.startswith("/stream"):
        assert sent.pop() == b"0\r\n\r\n"
    assert len(sent) == len(expected)
    for piece, pattern in zip(sent, expected, strict=True):
        assert re.fullmatch(pattern, piece, re.DOTALL)


def later() -> float:
    """A time that is certainly later than whatever happened before."""
    time.sleep(0.05)
    return time.monotonic()


def test_an_idle_connection_is_closed(connection: Connection) -> None:
    opened = time.monotonic()
    assert not connection.is_closed_at(opened + IDLE_TIMEOUT_S - 30)
    assert connection.is_closed_at(opened + IDLE_TIMEOUT_S)


def test_a_request_sent_byte_by_byte_must_arrive_in_time(connection: Connection) -> None:
    connection.send(HALF[:1])
    began = later()
    for byte in HALF[1:]:
        connection.send(bytes([byte]))
    assert not connection.is_closed_at(began + RECEIVE_TIMEOUT_S - 30)
    assert connection.is_closed_at(began + RECEIVE_TIMEOUT_S)


def test_empty_lines_do_not_count_as_activity(connection: Connection) -> None:
    """Waitress treats each of them as a complete request and resets its own timeout."""
    opened = time.monotonic()
    later()
    connection.send(b"\r\n\r\n")
    assert connection.is_closed_at(opened + IDLE_TIMEOUT_S + 0.01)


def test_a_client_must_read_its_response_in_time(connection: Connection) -> None:
    connection.send(http("/50000000", b"", method="GET"))  # more than the socket buffers hold
    assert not connection.is_closed_at(time.monotonic() + 10 * SEND_TIMEOUT_S), (
        "the request is still being served"
    )
    connection.channel.service()
    served = time.monotonic()
    connection.client.recv(65536)
    assert not connection.is_closed_at(served + SEND_TIMEOUT_S - 60)
    assert connection.is_closed_at(served + SEND_TIMEOUT_S + 50_000_000 / TRANSFER_RATE)


def test_a_pipelined_request_gets_its_full_time(connection: Connection) -> None:
    """Its first bytes arrive while the previous request is being served."""
    connection.send(http("/5", b"", method="GET") + HALF)
    served = later()
    connection.channel.service()
    assert not connection.is_closed_at(served + RECEIVE_TIMEOUT_S - 0.01)
    assert connection.is_closed_at(time.monotonic() + RECEIVE_TIMEOUT_S)


def test_a_client_of_a_rejected_request_has_time_to_send_its_body(connection: Connection) -> None:
    """It had 10 s, after which its connection was reset and the response was lost."""
    connection.send(b"POST /5 HTTP/1.1\r\nHost: x\r\nContent-Length: 1e9\r\n\r\n")
    connection.channel.service()
    before = time.monotonic()
    connection.channel.handle_write()
    connection.send(b"x" * 1000)
    assert not connection.is_closed_at(before + 30)
    assert connection.is_closed_at(time.monotonic() + LINGER_TIMEOUT_S + 0.01)
