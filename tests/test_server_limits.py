"""What is too much, too late, or not wanted any more."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from server_tools import (
    Running,
    Tap,
    chat_request,
    eventually,
    http,
    logged,
    query,
    serving,
    tiny_engine,
)

from smolcli.server.admission import AdmissionLimit
from smolcli.server.errors import HttpError
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message

LONG = {"max_new_tokens": 400, "repetition_penalty": 1.3}


@pytest.fixture
def running(tiny_folder: Path) -> Iterator[Running]:
    with serving(Tap().open, tiny_engine(tiny_folder)) as server:
        yield server


def test_who_knocks_beside_many_idle_connections_is_let_in_at_once(running: Running) -> None:
    """A pause between any two that come in made 100 of them wait for two seconds."""
    address = ("127.0.0.1", running.client.base_url.port)
    with ExitStack() as stack:
        connect = lambda: stack.enter_context(socket.create_connection(address))  # noqa: E731
        for _ in range(100):
            connect()
        eventually(lambda: running.client.get("/health").status_code == 200)
        began = time.monotonic()
        clients = [connect() for _ in range(100)]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert all(b" 200 " in client.recv(1000) for client in clients)
        assert time.monotonic() - began < 1


def test_a_flood_is_refused_by_count(tiny_folder: Path) -> None:
    """Of many queries at once exactly as many are let in as the queue holds."""
    tap = Tap(delay_s=0.02)
    with serving(tap.open, tiny_engine(tiny_folder), max_queue=10, max_batch_queries=6) as server:
        ready = server.client.get("/ready")
        barrier = threading.Barrier(40)

        def ask(number: int) -> tuple[int, str | None, str]:
            barrier.wait()
            response = server.ask(chat_id=str(number), max_new_tokens=60)
            body = response.json()
            assert body.get("chat_id", str(number)) == str(number)
            return (
                response.status_code,
                response.headers.get("Retry-After"),
                body.get("error_code", "answered"),
            )

        with ThreadPoolExecutor(40) as pool:
            outcomes = Counter(pool.map(ask, range(40)))
        assert ready.status_code == 200
        assert outcomes == {(200, None, "answered"): 10, (503, "2", "overloaded"): 30}


def test_a_batch_is_let_in_as_a_whole_or_not_at_all(tiny_folder: Path) -> None:
    tap = Tap(delay_s=0.02)
    with serving(tap.open, tiny_engine(tiny_folder), max_queue=10, max_batch_queries=8) as server:
        batch = {"queries": [query(max_new_tokens=60)] * 6}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(server.post, "/chat/batched", batch)
            eventually(lambda: tap.num_held == 6)
            assert server.post("/chat/batched", batch).status_code == 503
            assert server.post("/generate_batch", {"queries": [query()] * 4}).status_code == 200
            assert first.result().status_code == 200
        too_many = server.post("/chat/batched", {"queries": [query()] * 9})
        assert too_many.status_code == 413
        assert too_many.json()["error_code"] == "too_large"
        assert too_many.json()["field"] == "queries"


def test_the_gate_counts_in_one_step() -> None:
    """However many threads ask at once, no more get in than there is room for."""
    gate = AdmissionLimit(max_queries=100, max_requests=30)
    barrier = threading.Barrier(16)

    def enter(_: int) -> int:
        barrier.wait()
        entered = 0
        for _ in range(20):
            with suppress(HttpError):
                gate.enter(4)
                entered += 1
        return entered

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(enter, range(16))) == 25
    assert gate.is_full
    gate.finish_queries(100)
    for _ in range(25):
        gate.leave()
    gate.enter(100)


def test_ready_tells_of_a_full_queue(tiny_folder: Path) -> None:
    tap = Tap(delay_s=0.02)
    with (
        serving(tap.open, tiny_engine(tiny_folder), max_queue=1, max_batch_queries=1) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(server.ask, max_new_tokens=60)
        eventually(lambda: tap.num_held == 1)
        full = server.client.get("/ready")
        assert (full.status_code, full.json()) == (503, {"status": "full"})
        assert server.client.get("/health").json() == {"status": "ok"}
        assert asked.result().status_code == 200


def test_a_request_that_takes_too_long_ends(tiny_folder: Path) -> None:
    """/chat gets 504; of a batch, those items that have no answer yet say so."""
    tap = Tap(delay_s=0.02)
    with serving(tap.open, tiny_engine(tiny_folder), request_timeout_s=1.0) as server:
        late = server.ask(**LONG)
        assert (late.status_code, late.json()["error_code"]) == (504, "timeout")
        quick, slow = query(chat_id="a", max_new_tokens=2), query(chat_id="b", **LONG)
        batch = server.post("/chat/batched", {"queries": [slow, quick]})
        assert batch.status_code == 200
        first, second = batch.json()["responses"]
        assert (first["chat_id"], first["error_code"]) == ("b", "timeout")
        assert "response" in second
        eventually(lambda: tap.num_held == 0)


def test_bodies_that_are_too_large(tiny_folder: Path) -> None:
    """Ours are refused by Flask, which says what the limit is, the absurd ones by Waitress."""
    with serving(Tap().open, tiny_engine(tiny_folder), max_body_bytes=100_000) as server:
        for num_chars in (100_001, 500_000):
            response = server.ask("x" * num_chars)
            assert response.status_code == 413
            assert response.json()["error_code"] == "too_large"
        assert "larger than 100,000 bytes" in server.ask("x" * 100_001).json()["error"]

        def chunks(num: int) -> list[bytes]:
            return [b"x" * 10_000] * num

        headers = {"Content-Type": "application/json"}
        for num in (11, 50):
            response = server.client.post("/chat", content=iter(chunks(num)), headers=headers)
            assert response.status_code == 413


def leave_abruptly(connection: socket.socket) -> None:
    """Close with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, leave_abruptly])
@pytest.mark.parametrize("path", ["/chat", "/chat/batched", "stream", "/v1/chat/completions"])
def test_a_client_that_goes_away_frees_its_slots(
    tiny_folder: Path, path: str, leave: Callable[[socket.socket], None]
) -> None:
    """The engine drops what it asked for, and the log says so."""
    tap = Tap(delay_s=0.05)
    route = "/chat/batched" if path == "stream" else path
    with serving(tap.open, tiny_engine(tiny_folder)) as server, logged(route) as log:
        connection = server.connect()
        connection.sendall(long_request(path, tiny_folder.name))
        eventually(lambda: tap.num_held > 0)
        if path.startswith("/v1"):
            connection.recv(10)
        leave(connection)
        eventually(lambda: tap.num_held == 0)
        assert log.wait(1).fields["error_code"] == "cancelled"
        number = 20 if route == "/chat/batched" else 1
        counted = f'smol_request_errors_total{{code="cancelled"}} {number}.0'
        assert counted in server.client.get("/metrics").text
        assert server.ask().status_code == 200


def test_a_client_that_goes_away_with_its_next_question_sent_already(tiny_folder: Path) -> None:
    tap = Tap(delay_s=0.05)
    with serving(tap.open, tiny_engine(tiny_folder)) as server:
        connection = server.connect()
        connection.sendall(chat_request(**LONG) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: tap.num_held > 0)
        connection.close()
        eventually(lambda: tap.num_held == 0, 5)


def long_request(path: str, model: str) -> bytes:
    headers = ["Content-Type: application/json"]
    if path == "/chat":
        return chat_request(**LONG)
    if path.startswith("/v1"):
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 400,
            "repetition_penalty": 1.3,
            "stream": True,
        }
        return http(path, json.dumps(asked).encode(), *headers)
    if path == "stream":
        headers.append("Accept: application/x-ndjson")
    batch = {"queries": [query(chat_id=n, **LONG) for n in range(20)]}
    return http("/chat/batched", json.dumps(batch).encode(), *headers)


def test_a_query_that_breaks_the_engine_fails_alone(tiny_folder: Path) -> None:
    """Those that share its batch are answered as if it were not there."""
    tap, chat = Tap(), ChatTokenizer.load(tiny_folder)
    harmless, harmful = (set(chat.encode((Message("user", text),))) for text in ("", "~"))
    good, bad = query("What is gravity?"), query("~", chat_id="2")
    with serving(tap.open, tiny_engine(tiny_folder)) as server:
        expected = server.post("/chat", good).json()
        (tap.models[0].poison_id,) = harmful - harmless
        batch = server.post("/chat/batched", {"queries": [good, bad, good]}).json()["responses"]
        assert [batch[0], batch[2]] == [expected, expected]
        assert (batch[1]["chat_id"], batch[1]["error_code"]) == ("2", "internal")
        alone = server.post("/chat", bad)
        assert (alone.status_code, alone.json()["error_code"]) == (500, "internal")
        assert server.client.get("/health").status_code == 200
        assert server.post("/chat", good).json() == expected


def test_an_engine_that_died(tiny_folder: Path) -> None:
    """All who wait learn of it, /health and /ready say so, and later ones are refused at once."""
    tap = Tap(delay_s=0.02)
    with serving(tap.open, tiny_engine(tiny_folder)) as server:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.ask, chat_id=str(n), **LONG) for n in range(4)]
            eventually(lambda: tap.backends[0].health().num_running == 4)
            tap.models[0].is_broken = True
            for response in (future.result() for future in asked):
                assert response.status_code == 503
                assert response.json()["error_code"] == "backend_error"
        health = server.client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        assert server.client.get("/ready").json() == {"status": "dead"}
        assert server.ask().status_code == 503
        batch = server.post("/chat/batched", {"queries": [query()]})
        assert batch.json()["responses"][0]["error_code"] == "backend_error"


def test_a_short_question_passes_a_long_batch(tiny_folder: Path) -> None:
    """It does not wait until the batch is through."""
    tap = Tap(delay_s=0.002)
    engine = tiny_engine(tiny_folder)
    with serving(tap.open, engine) as server, ThreadPoolExecutor(1) as pool:
        batch = {"queries": [query(chat_id=n, max_new_tokens=12) for n in range(100)]}
        flood = pool.submit(server.post, "/chat/batched", batch)
        eventually(lambda: tap.num_held == 100)
        for number in range(3):
            assert server.ask(chat_id=f"short {number}").status_code == 200
        assert tap.num_held > 50
        assert not flood.done()
        assert len(flood.result().json()["responses"]) == 100


def test_slow_and_idle_connections_keep_nobody_out(running: Running) -> None:
    """Slow-loris: many connections that never finish a request."""
    connections = [running.connect() for _ in range(100)]
    try:
        for connection in connections:
            connection.sendall(b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Slow:")
        assert running.ask().status_code == 200
    finally:
        for connection in connections:
            connection.close()
