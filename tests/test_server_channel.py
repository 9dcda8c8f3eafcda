"""How long a client may hold a connection, and with what."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
from server_tools import http
from waitress import create_server

from smolcli.server.wsgi import IDLE_S, RECEIVE_S, SEND_S, Channel

HALF = b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Slow:"


@dataclass
class Line:
    """A connection of a server that nobody turns, and the client's end of it."""

    channel: Channel
    client: socket.socket

    def is_dropped_at(self, when: float) -> bool:
        self.channel.drop_if_slow(when)
        return self.channel.will_close

    def say(self, data: bytes) -> None:
        self.client.sendall(data)
        self.channel.handle_read()


@pytest.fixture
def line() -> Iterator[Line]:
    with (
        closing(create_server(answer, listen="127.0.0.1:0", threads=0, map={})) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        accepted, address = listener.accept()
        channel = Channel(server, accepted, address, server.adj, map={})
        yield Line(channel, client)
        channel.handle_close()


def answer(environ: dict[str, str], start_response: Callable[..., object]) -> list[bytes]:
    body = b"x" * int(environ["PATH_INFO"][1:])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def later() -> float:
    """The time, certainly after whatever was before."""
    time.sleep(0.05)
    return time.monotonic()


def test_who_says_nothing(line: Line) -> None:
    opened = time.monotonic()
    assert not line.is_dropped_at(opened + IDLE_S - 1)
    assert line.is_dropped_at(opened + IDLE_S)


def test_who_sends_a_byte_now_and_then(line: Line) -> None:
    line.say(HALF[:1])
    begun = later()
    for byte in HALF[1:]:
        line.say(bytes([byte]))
    assert not line.is_dropped_at(begun + RECEIVE_S - 1)
    assert line.is_dropped_at(begun + RECEIVE_S)


def test_who_sends_empty_lines(line: Line) -> None:
    """To Waitress each is a request that is whole, and a sign of life."""
    opened = time.monotonic()
    later()
    line.say(b"\r\n\r\n")
    assert line.is_dropped_at(opened + IDLE_S + 0.01)


def test_who_does_not_take_the_answer(line: Line) -> None:
    line.say(http("/50000000", b"", method="GET"))  # more than a socket takes
    assert not line.is_dropped_at(time.monotonic() + 10 * SEND_S), "it is being served"
    line.channel.service()
    served = time.monotonic()
    line.client.recv(65536)
    assert not line.is_dropped_at(served + SEND_S - 60)
    assert line.is_dropped_at(served + SEND_S)


def test_the_next_request_has_its_whole_time(line: Line) -> None:
    """Its first bytes came while the one before it was being served."""
    line.say(http("/5", b"", method="GET") + HALF)
    served = later()
    line.channel.service()
    assert not line.is_dropped_at(served + RECEIVE_S - 0.01)
    assert line.is_dropped_at(time.monotonic() + RECEIVE_S)
