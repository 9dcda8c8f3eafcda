"""What becomes of every request when something goes wrong: a table, in four minutes at most.

python -m benchmarks.serve_faults

Three faults are the engine's, in a server of this process around the real model; the others come
over the wire, at a `smol serve` of its own.
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

from benchmarks.breakable import BreakableModel, open_breakable
from benchmarks.crowd import PATIENCE_S, Crowd, aftermath, get, num_held, query, until
from benchmarks.rubbish import rubbish
from benchmarks.serving import Target, target
from smolcli.server.wsgi import Server
from smolcli.settings import EngineSettings, ServerSettings

CRASH = struct.pack("ii", 1, 0)  # a socket that lingers for no time is reset


@dataclass
class Row:
    """One fault, what became of the requests, and how the server was afterwards."""

    fault: str
    fates: Counter[str] = field(default_factory=Counter)
    after: str = ""

    def __str__(self) -> str:
        fates = ", ".join(f"{fate}: {number:,}" for fate, number in self.fates.most_common())
        return f"| {self.fault} | {self.fates.total():,} | {fates} | {self.after} |"


@contextmanager
def broken_server() -> Iterator[tuple[Target, BreakableModel]]:
    """A server in this process, and the model in it."""
    models: list[BreakableModel] = []
    settings = ServerSettings(port=0, engine=EngineSettings())
    server = Server(settings, lambda engine: open_breakable(engine, models))
    thread = threading.Thread(target=server.run)
    thread.start()
    reached = Target(server.url, None)
    until(lambda: get(reached, "/ready")[0] == 200)
    try:
        yield reached, models[0]
    finally:
        server.stop()
        thread.join()


def engine_faults() -> Iterator[Row]:
    with broken_server() as (server, model):
        yield poisoned(server, model)
        yield failing(server, model, "one step fails, once, with 32 in it", 1)
        yield failing(server, model, "no step succeeds any more, with 32 in it", sys.maxsize)


def poisoned(server: Target, model: BreakableModel) -> Row:
    crowd = Crowd(server)
    crowd.ask([query(n) for n in range(16)])
    until(lambda: num_held(server) >= 16)
    crowd.ask([query(16, prompt=model.poison)])
    batch = [query(n) for n in range(7)] + [query(7, prompt=model.poison)]
    crowd.ask([{"queries": batch}], "/chat/batched")
    fault = "one query of many breaks each step that it is in"
    return Row(fault, crowd.fates(), aftermath(server))


def failing(server: Target, model: BreakableModel, fault: str, num_failures: int) -> Row:
    crowd = Crowd(server)
    crowd.ask([query(n) for n in range(32)])
    until(lambda: num_held(server) >= 32)
    model.num_failures = num_failures
    return Row(fault, crowd.fates(), aftermath(server))


def killed_clients(server: Target) -> Row:
    row, crowd = Row("16 clients are killed in the middle of a stream, 8 others ask"), Crowd(server)
    model = json.loads(get(server, "/v1/models")[1])["data"][0]["id"]
    one = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 200}
    many = {"queries": [query(n, 4 + 60 * n) for n in range(4)]}
    streams = []
    for _ in range(8):
        streams.append(send(server, "/v1/chat/completions", one | {"model": model, "stream": True}))
        streams.append(send(server, "/chat/batched", many, "Accept: application/x-ndjson"))
    crowd.ask([query(n) for n in range(8)])
    for stream in streams:
        received = b""
        while b"chatcmpl" not in received and b'"index"' not in received:
            received += stream.recv(4096)
    for stream in streams:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CRASH)
        stream.close()
        row.fates["killed"] += 1
    freed_s = until(lambda: num_held(server) <= 8)
    row.fates += crowd.fates()
    row.after = f"their slots free after {freed_s:.1f} s; {aftermath(server)}"
    return row


def send(server: Target, path: str, value: Any, *headers: str) -> socket.socket:
    """Ask, and do not wait for the answer."""
    body = json.dumps(value).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    head = "\r\n".join([*lines, "Content-Type: application/json", "", ""])
    connection = socket.create_connection(server.address, PATIENCE_S)
    connection.sendall(head.encode() + body)
    return connection


def malformed(server: Target, number: int) -> Row:
    row, crowd = Row(f"{number:,} malformed requests, 8 others ask"), Crowd(server)
    crowd.ask([query(n) for n in range(8)])
    with ThreadPoolExecutor(8) as pool:
        row.fates = Counter(pool.map(lambda n: refused(server, rubbish(n)), range(number)))
    row.fates += crowd.fates()
    row.after = aftermath(server)
    return row


def refused(server: Target, data: bytes) -> str:
    """What the server says to bytes that are no good."""
    answer = b""
    with socket.create_connection(server.address, PATIENCE_S) as connection:
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
    """Half of them never end the head of a request, half the body."""
    row, crowd = Row(f"{number} connections send a byte each second, 8 others ask"), Crowd(server)
    heads = [b"POST /chat HTTP/1.1\r\nHost: x\r\n", b"Content-Length: 9999\r\n\r\n"]
    connections = [socket.create_connection(server.address, PATIENCE_S) for _ in range(number)]
    for index, connection in enumerate(connections):
        connection.sendall(b"".join(heads[: 1 + index % 2]))
    began = time.perf_counter()
    crowd.ask([query(n) for n in range(8)])
    row.fates = crowd.fates()
    while connections and time.perf_counter() - began < PATIENCE_S:
        connections = [connection for connection in connections if drips(connection)]
        time.sleep(1)
    row.fates["dropped"] += number - len(connections)
    row.fates += Counter({"HELD FOR EVER": len(connections)})
    row.after = f"all dropped after {time.perf_counter() - began:.0f} s; {aftermath(server)}"
    return row


def drips(connection: socket.socket) -> bool:
    """Send one byte more; returns whether the server still listens."""
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
    row = Row("SIGTERM with 64 questions and a batch of 32 under way, then 8 more")
    crowd = Crowd(server)
    crowd.ask([query(n) for n in range(64)])
    crowd.ask([{"queries": [query(n) for n in range(32)]}], "/chat/batched")
    until(lambda: num_held(server) >= 96)
    assert server.process
    server.process.send_signal(signal.SIGTERM)
    began = time.perf_counter()
    until(lambda: get(server, "/ready")[0] == 503)
    crowd.ask([query(n) for n in range(8)])
    row.fates = crowd.fates()
    code = server.process.wait(PATIENCE_S)
    row.after = f"exit code {code} after {time.perf_counter() - began:.1f} s"
    return row


def rows(num_malformed: int, num_slow: int) -> Iterator[Row]:
    yield from engine_faults()
    with target(None, "--drain-timeout", str(PATIENCE_S)) as server:
        yield killed_clients(server)
        yield malformed(server, num_malformed)
        yield slow(server, num_slow)
        yield terminated(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=200, help="connections of slow clients")
    arguments = parser.parse_args()
    sys.stdout.write("| fault | requests | what became of them | afterwards |\n|---|---|---|---|\n")
    for row in rows(arguments.malformed, arguments.slow):
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
