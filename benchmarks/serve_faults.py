"""The outcome of every request when something fails, as a table; takes up to four minutes.

    python -m benchmarks.serve_faults

Three faults are injected into the engine of a server in this process; the others arrive over the
network at a separate `smol serve`. All use the real model.
"""

import argparse
import json
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fault_injection import FaultyModel, open_faulty
from benchmarks.load_generator import (
    TIMEOUT_S,
    LoadGenerator,
    check_health,
    get,
    num_unfinished,
    query,
    wait_until,
)
from benchmarks.malformed_requests import malformed_request
from benchmarks.server_harness import Target, target
from smolcli.server.wsgi import Server
from smolcli.settings import EngineSettings, ServerSettings

CRASH = struct.pack("ii", 1, 0)  # zero linger: closing resets the connection


@dataclass
class Row:
    """A fault, the outcomes of the requests, and the server's health afterwards."""

    fault: str
    outcomes: Counter[str] = field(default_factory=Counter)
    after: str = ""

    def __str__(self) -> str:
        outcomes = ", ".join(
            f"{outcome}: {number:,}" for outcome, number in self.outcomes.most_common()
        )
        return f"| {self.fault} | {self.outcomes.total():,} | {outcomes} | {self.after} |"


@contextmanager
def faulty_server() -> Iterator[tuple[Target, FaultyModel]]:
    """A server in this process, and its model."""
    models: list[FaultyModel] = []
    settings = ServerSettings(port=0, engine=EngineSettings())
    server = Server(settings, lambda engine: open_faulty(engine, models))
    thread = threading.Thread(target=server.run)
    thread.start()
    reached = Target(server.url, None)
    wait_until(lambda: get(reached, "/ready")[0] == 200)
    try:
        yield reached, models[0]
    finally:
        server.stop()
        thread.join()


def engine_faults() -> Iterator[Row]:
    with faulty_server() as (server, model):
        yield poisoned(server, model)
        yield failing(server, model, "one step with 32 queries fails", 1)
        yield failing(server, model, "every step fails, with 32 queries running", sys.maxsize)


def poisoned(server: Target, model: FaultyModel) -> Row:
    load = LoadGenerator(server)
    load.ask([query(n) for n in range(16)])
    wait_until(lambda: num_unfinished(server) >= 16)
    load.ask([query(16, prompt=model.poison)])
    batch = [query(n) for n in range(7)] + [query(7, prompt=model.poison)]
    load.ask([{"queries": batch}], "/chat/batched")
    fault = "one query of many fails every step that contains it"
    return Row(fault, load.outcomes(), check_health(server))


def failing(server: Target, model: FaultyModel, fault: str, num_failures: int) -> Row:
    load = LoadGenerator(server)
    load.ask([query(n) for n in range(32)])
    wait_until(lambda: num_unfinished(server) >= 32)
    model.num_failures = num_failures
    return Row(fault, load.outcomes(), check_health(server))


def killed_clients(server: Target) -> Row:
    row = Row("16 clients are killed while streaming; 8 others send queries")
    load = LoadGenerator(server)
    model = json.loads(get(server, "/v1/models")[1])["data"][0]["id"]
    one = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 200}
    many = {"queries": [query(n, 4 + 60 * n) for n in range(4)]}
    streams = []
    for _ in range(8):
        streams.append(send(server, "/v1/chat/completions", one | {"model": model, "stream": True}))
        streams.append(send(server, "/chat/batched", many, "Accept: application/x-ndjson"))
    load.ask([query(n) for n in range(8)])
    for stream in streams:
        received = b""
        while b"chatcmpl" not in received and b'"index"' not in received:
            received += stream.recv(4096)
    for stream in streams:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CRASH)
        stream.close()
        row.outcomes["killed"] += 1
    freed_s = wait_until(lambda: num_unfinished(server) <= 8)
    row.outcomes += load.outcomes()
    row.after = f"slots free after {freed_s:.1f} s; {check_health(server)}"
    return row


def send(server: Target, path: str, value: Any, *headers: str) -> socket.socket:
    """Send a request without waiting for the answer."""
    body = json.dumps(value).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    head = "\r\n".join([*lines, "Content-Type: application/json", "", ""])
    connection = socket.create_connection(server.address, TIMEOUT_S)
    connection.sendall(head.encode() + body)
    return connection


def malformed(server: Target, number: int) -> Row:
    row = Row(f"{number:,} malformed requests; 8 others send queries")
    load = LoadGenerator(server)
    load.ask([query(n) for n in range(8)])
    with ThreadPoolExecutor(8) as pool:
        row.outcomes = Counter(
            pool.map(lambda n: answer_to(server, malformed_request(n)), range(number))
        )
    row.outcomes += load.outcomes()
    row.after = check_health(server)
    return row


def answer_to(server: Target, data: bytes) -> str:
    """The server's answer to malformed bytes."""
    answer = b""
    with socket.create_connection(server.address, TIMEOUT_S) as connection:
        try:
            with suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(data)
                while piece := connection.recv(65536):
                    answer += piece
        except TimeoutError:
            return "HUNG"
    if not answer:
        return "closed"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    return str(status) if isinstance(json.loads(body), dict) else f"{status} WITHOUT JSON"


def slow(server: Target, number: int) -> Row:
    """Half of the connections never finish the head of a request, half never the body."""
    row = Row(f"{number} connections send one byte per second; 8 others send queries")
    load = LoadGenerator(server)
    heads = [b"POST /chat HTTP/1.1\r\nHost: x\r\n", b"Content-Length: 9999\r\n\r\n"]
    connections = [socket.create_connection(server.address, TIMEOUT_S) for _ in range(number)]
    for index, connection in enumerate(connections):
        connection.sendall(b"".join(heads[: 1 + index % 2]))
    began = time.perf_counter()
    load.ask([query(n) for n in range(8)])
    row.outcomes = load.outcomes()
    while connections and time.perf_counter() - began < TIMEOUT_S:
        connections = [connection for connection in connections if is_open(connection)]
        time.sleep(1)
    row.outcomes["closed"] += number - len(connections)
    row.outcomes += Counter({"NEVER CLOSED": len(connections)})
    row.after = f"all closed after {time.perf_counter() - began:.0f} s; {check_health(server)}"
    return row


def is_open(connection: socket.socket) -> bool:
    """Send one more byte; returns whether the connection is still open."""
    try:
        connection.sendall(b"x")
        connection.setblocking(False)
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.setblocking(True)


def terminated(server: Target) -> Row:
    row = Row("SIGTERM with 64 queries and a batch of 32 in flight, then 8 more")
    load = LoadGenerator(server)
    load.ask([query(n) for n in range(64)])
    load.ask([{"queries": [query(n) for n in range(32)]}], "/chat/batched")
    wait_until(lambda: num_unfinished(server) >= 96)
    assert server.process
    server.process.send_signal(signal.SIGTERM)
    began = time.perf_counter()
    wait_until(lambda: get(server, "/ready")[0] == 503)
    load.ask([query(n) for n in range(8)])
    row.outcomes = load.outcomes()
    code = server.process.wait(TIMEOUT_S)
    row.after = f"exit code {code} after {time.perf_counter() - began:.1f} s"
    return row


def rows(num_malformed: int, num_slow: int) -> Iterator[Row]:
    yield from engine_faults()
    with target(None, "--drain-timeout", str(TIMEOUT_S)) as server:
        yield killed_clients(server)
        yield malformed(server, num_malformed)
        yield slow(server, num_slow)
        yield terminated(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=200, help="connections of slow clients")
    arguments = parser.parse_args()
    sys.stdout.write("| fault | requests | outcomes | afterwards |\n|---|---|---|---|\n")
    for row in rows(arguments.malformed, arguments.slow):
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
