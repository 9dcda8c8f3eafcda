"""Overload, timeouts, disconnected clients and failing engines."""

import json
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from fakes import EchoBackend, HeldBackend
from server_tools import (
    FaultyBackend,
    RunningServer,
    captured_log,
    chat_request,
    eventually,
    http,
    query,
    serving,
    tiny_engine,
)

from smolcli.backends.base import OnText
from smolcli.server.admission import AdmissionLimit, spread_retry_s
from smolcli.server.errors import HttpError
from smolcli.server.wsgi import connection_limit
from smolcli.settings import EngineSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message, Query, Result

LONG: dict[str, Any] = {"max_new_tokens": 400, "repetition_penalty": 1.3}


@pytest.fixture
def running(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(FaultyBackend().open, tiny_engine(tiny_folder)) as server:
        yield server


def test_new_connections_are_accepted_without_a_pause(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause after each of them used to make 100 new connections wait for 2 s."""
    pauses: list[float] = []
    sleep = time.sleep

    def record(pause_s: float) -> None:
        if threading.current_thread() is running.thread:
            pauses.append(pause_s)
        sleep(pause_s)

    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(running.address))

        for _ in range(100):
            connect()
        eventually(lambda: running.client.get("/health").status_code == 200)
        monkeypatch.setattr(time, "sleep", record)
        *_, last = [connect() for _ in range(100)]
        last.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in last.recv(1000)
    assert len(pauses) < 50


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not limit open files")
def test_the_limit_on_open_files_is_raised_or_limits_the_connections(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every poll failed to accept a connection, and logged a traceback."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 2 * 300 + 64
    if hard == resource.RLIM_INFINITY or hard <= enough:  # infinite on macOS
        pytest.skip("the limit cannot be raised, or there is none")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert connection_limit(300) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == enough
        assert not caplog.messages
        assert connection_limit(hard) == (hard - 64) // 2
        assert f"raise that limit (ulimit -n, LimitNOFILE) to {2 * hard + 64}" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_exactly_the_queries_above_the_limit_are_rejected(tiny_folder: Path) -> None:
    """Exactly as many concurrent queries are admitted as the queue holds."""
    faulty = FaultyBackend()
    with serving(
        faulty.open, tiny_engine(tiny_folder), max_queue=10, max_batch_queries=6
    ) as server:
        barrier = threading.Barrier(40)

        def ask(number: int) -> tuple[int, str]:
            barrier.wait()
            response = server.ask(chat_id=str(number))
            body = response.json()
            assert body.get("chat_id", str(number)) == str(number)
            assert 2 <= int(response.headers.get("Retry-After", 2)) <= 60
            return response.status_code, body.get("error_code", "answered")

        with ThreadPoolExecutor(40) as pool:
            with faulty.models[0].held():
                asked = [pool.submit(ask, number) for number in range(40)]
                eventually(lambda: sum(each.done() for each in asked) >= 30)
            outcomes = Counter(each.result() for each in asked)
        assert outcomes == {(200, "answered"): 10, (503, "overloaded"): 30}


def test_a_batch_is_admitted_whole_or_not_at_all(tiny_folder: Path) -> None:
    faulty = FaultyBackend()
    with serving(
        faulty.open, tiny_engine(tiny_folder), max_queue=10, max_batch_queries=8
    ) as server:
        batch = {"queries": [query()] * 6}
        with ThreadPoolExecutor(2) as pool:
            with faulty.models[0].held():
                first = pool.submit(server.post, "/chat/batched", batch)
                eventually(lambda: faulty.num_queries == 6)
                assert server.post("/chat/batched", batch).status_code == 503
                rest = pool.submit(server.post, "/generate_batch", {"queries": [query()] * 4})
                eventually(lambda: faulty.num_queries == 10)
            assert [each.result().status_code for each in (first, rest)] == [200, 200]
        too_many = server.post("/chat/batched", {"queries": [query()] * 9})
        assert too_many.status_code == 413
        assert too_many.json()["error_code"] == "too_large"
        assert too_many.json()["field"] == "queries"


def test_the_admission_limit_is_thread_safe() -> None:
    """However many threads enter at once, no more are admitted than fit."""
    limit = AdmissionLimit(max_queries=100, max_requests=30)
    barrier = threading.Barrier(16)

    def enter(_: int) -> int:
        barrier.wait()
        entered = 0
        for _ in range(20):
            with suppress(HttpError):
                limit.enter(4)
                entered += 1
        return entered

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(enter, range(16))) == 25
    assert limit.is_full
    for _ in range(100):
        limit.finish_query()
    for _ in range(25):
        limit.leave()
    limit.enter(100)


@pytest.mark.parametrize("is_interactive", [True, False])
def test_neither_priority_takes_every_request(is_interactive: bool) -> None:
    """With as many chat clients as the limit, every batch request was once rejected, forever."""
    limit = AdmissionLimit(max_queries=1000, max_requests=64)
    for _ in range(64):
        limit.enter(1, is_interactive=is_interactive)
    with pytest.raises(HttpError):
        limit.enter(1, is_interactive=is_interactive)
    for _ in range(8):
        limit.enter(1, is_interactive=not is_interactive)
    with pytest.raises(HttpError):
        limit.enter(1, is_interactive=not is_interactive)
    limit.leave(is_interactive=not is_interactive)
    limit.enter(1, is_interactive=not is_interactive)


@pytest.mark.parametrize("is_interactive", [True, False])
def test_neither_priority_takes_every_query(is_interactive: bool) -> None:
    """A batch as large as the queue once made the server reject every chat until it was done."""
    limit = AdmissionLimit(max_queries=80, max_requests=64)
    for _ in range(20):
        limit.enter(4, is_interactive=is_interactive)
    with pytest.raises(HttpError):
        limit.enter(1, is_interactive=is_interactive)
    limit.enter(10, is_interactive=not is_interactive)
    with pytest.raises(HttpError):
        limit.enter(1, is_interactive=not is_interactive)
    limit.finish_query(is_interactive=not is_interactive)
    limit.enter(1, is_interactive=not is_interactive)


@pytest.mark.parametrize(
    ("num_queries", "query_s", "expected"),
    [(0, 1.0, [2, 2, 2]), (10, 0.0, [2, 2, 2]), (20, 1.0, [2, 12, 21]), (2000, 1.0, [2, 60, 60])],
)
def test_retries_are_spread_over_the_time_that_the_queue_needs(
    num_queries: int, query_s: float, expected: list[int]
) -> None:
    fractions = (0.0, 0.5, 0.99)
    assert [spread_retry_s(num_queries, query_s, each) for each in fractions] == expected


def test_rejected_clients_retry_at_different_times() -> None:
    """All of them used to be told to come back after 2 s, together."""
    limit = AdmissionLimit(max_queries=100, max_requests=10)
    limit.enter(100)
    time.sleep(0.2)  # so that the queue needs at least 20 s
    limit.finish_query()
    retries = set()
    for _ in range(100):
        with pytest.raises(HttpError) as caught:
            limit.enter(2)
        retries.add(int(caught.value.headers["Retry-After"]))
    assert len(retries) > 10
    assert min(retries) >= 2
    assert max(retries) <= 60


def test_a_full_server_is_not_ready(tiny_folder: Path) -> None:
    faulty = FaultyBackend()
    with (
        serving(faulty.open, tiny_engine(tiny_folder), max_queue=1, max_batch_queries=1) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        with faulty.models[0].held():
            asked = pool.submit(server.ask)
            eventually(lambda: faulty.num_queries == 1)
            full = server.client.get("/ready")
            assert (full.status_code, full.json()) == (503, {"status": "full"})
            assert server.client.get("/health").json() == {"status": "ok"}
        assert asked.result().status_code == 200


class SelectiveBackend(HeldBackend):
    """Answers the prompt "quick" at once and no other."""

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        if query.messages[-1].content == "quick":
            return EchoBackend().submit(query, on_text, is_interactive=is_interactive)
        return super().submit(query, on_text, is_interactive=is_interactive)


def test_a_request_times_out() -> None:
    """/chat gets 504; in a batch, each unfinished item fails with `timeout`."""
    backend = SelectiveBackend()
    with serving(
        lambda _: backend, EngineSettings(), is_gateway=True, request_timeout_s=1.0
    ) as server:
        late = server.ask("slow")
        assert (late.status_code, late.json()["error_code"]) == (504, "timeout")
        quick, slow = query("quick", chat_id="a"), query("slow", chat_id="b")
        batch = server.post("/chat/batched", {"queries": [slow, quick]})
        assert batch.status_code == 200
        first, second = batch.json()["responses"]
        assert (first["chat_id"], first["error_code"]) == ("b", "timeout")
        assert "response" in second
    assert [future.cancelled() for future in backend.futures] == [True, True]


def test_a_body_that_is_too_large_is_rejected(tiny_folder: Path) -> None:
    with serving(FaultyBackend().open, tiny_engine(tiny_folder), max_body_bytes=100_000) as server:
        for num_chars in (100_001, 500_000):
            response = server.ask("x" * num_chars)
            assert response.status_code == 413
            assert response.json()["error_code"] == "too_large"
        assert "larger than the limit of 100,000 bytes" in server.ask("x" * 100_001).json()["error"]

        def chunks(num: int) -> list[bytes]:
            return [b"x" * 10_000] * num

        headers = {"Content-Type": "application/json"}
        for num in (11, 50):
            response = server.client.post("/chat", content=iter(chunks(num)), headers=headers)
            assert response.status_code == 413


def reset(connection: socket.socket) -> None:
    """Close the connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("disconnect", [socket.socket.close, reset])
@pytest.mark.parametrize("path", ["/chat", "/chat/batched", "stream", "/v1/chat/completions"])
def test_a_client_that_disconnects_frees_its_slots(
    tiny_folder: Path, path: str, disconnect: Callable[[socket.socket], None]
) -> None:
    """The engine cancels its queries, and the access log and metrics report them."""
    faulty = FaultyBackend(delay_s=0.05)
    route = "/chat/batched" if path == "stream" else path
    with serving(faulty.open, tiny_engine(tiny_folder)) as server, captured_log(route) as log:
        connection = server.connect()
        connection.sendall(long_request(path, tiny_folder.name))
        eventually(lambda: faulty.num_queries > 0)
        if path.startswith("/v1"):
            connection.recv(10)
        disconnect(connection)
        eventually(lambda: faulty.num_queries == 0)
        assert log.wait(1).fields["error_code"] == "cancelled"
        number = 20 if route == "/chat/batched" else 1
        counted = f'smol_request_errors_total{{code="cancelled"}} {number}.0'
        assert counted in server.client.get("/metrics").text
        assert server.ask().status_code == 200


def test_a_client_that_disconnects_after_pipelining_a_request_frees_its_slots(
    tiny_folder: Path,
) -> None:
    faulty = FaultyBackend(delay_s=0.05)
    with serving(faulty.open, tiny_engine(tiny_folder)) as server, captured_log("/chat") as log:
        connection = server.connect()
        connection.sendall(chat_request(**LONG) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: faulty.num_queries > 0)
        connection.close()
        assert log.wait(1).fields["error_code"] == "cancelled"
        eventually(lambda: faulty.num_queries == 0)


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


def test_a_query_that_makes_the_engine_fail_fails_alone(tiny_folder: Path) -> None:
    """Queries in the same batch get the same answers as without it."""
    faulty, chat = FaultyBackend(), ChatTokenizer.load(tiny_folder)
    harmless, poison = (set(chat.encode((Message("user", text),))) for text in ("", "~"))
    good, bad = query("What is gravity?"), query("~", chat_id="2")
    with serving(faulty.open, tiny_engine(tiny_folder)) as server:
        expected = server.post("/chat", good).json()
        (faulty.models[0].poison_id,) = poison - harmless
        batch = server.post("/chat/batched", {"queries": [good, bad, good]}).json()["responses"]
        assert [batch[0], batch[2]] == [expected, expected]
        assert (batch[1]["chat_id"], batch[1]["error_code"]) == ("2", "internal")
        alone = server.post("/chat", bad)
        assert (alone.status_code, alone.json()["error_code"]) == (500, "internal")
        assert server.client.get("/health").status_code == 200
        assert server.post("/chat", good).json() == expected


def test_a_dead_engine_is_reported_to_everyone(tiny_folder: Path) -> None:
    """In-flight queries fail, /health and /ready report it, and new queries fail at once."""
    faulty = FaultyBackend(delay_s=0.02)
    with serving(faulty.open, tiny_engine(tiny_folder)) as server:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.ask, chat_id=str(n), **LONG) for n in range(4)]
            eventually(lambda: faulty.backends[0].health().num_running == 4)
            faulty.models[0].is_broken = True
            for response in (future.result() for future in asked):
                assert response.status_code == 503
                assert response.json()["error_code"] == "backend_error"
        health = server.client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        assert server.client.get("/ready").json() == {"status": "dead"}
        assert server.ask().status_code == 503
        batch = server.post("/chat/batched", {"queries": [query()]})
        assert batch.json()["responses"][0]["error_code"] == "backend_error"


def test_interactive_requests_overtake_a_long_batch(tiny_folder: Path) -> None:
    faulty = FaultyBackend(delay_s=0.002)
    body = json.dumps({"queries": [query(chat_id=n, **LONG) for n in range(300)]}).encode()
    with serving(faulty.open, tiny_engine(tiny_folder)) as server:
        connection = server.connect()
        connection.sendall(http("/chat/batched", body, "Content-Type: application/json"))
        eventually(lambda: faulty.num_queries == 300)
        for number in range(3):
            assert server.ask(chat_id=f"short {number}").status_code == 200
        assert faulty.num_queries > 200, "the batch is far from finished"
        connection.close()
        eventually(lambda: faulty.num_queries == 0)


def test_slow_connections_do_not_block_others(running: RunningServer) -> None:
    """Slowloris: many connections that never complete a request."""
    connections = [running.connect() for _ in range(100)]
    try:
        for connection in connections:
            connection.sendall(b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Slow:")
        assert running.ask().status_code == 200
    finally:
        for connection in connections:
            connection.close()
