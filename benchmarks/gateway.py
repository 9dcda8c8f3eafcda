"""Latency that a gateway adds, and how many model services one client can keep busy.

python -m benchmarks.gateway overhead [MODEL]    added latency of /chat, and time of a batch
python -m benchmarks.gateway workers [NUM ...]   simulated services that take 1 s for 64 queries
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

from benchmarks.server_harness import Target, post, print_line, prompts, target
from smolcli.backends.remote.backend import open_remote
from smolcli.batch.pipeline import answer_all
from smolcli.settings import DEFAULT_MODEL, RemoteSettings
from smolcli.types import Message, Query

NUM_ASKED = 100
NUM_BATCH = 256
BATCH_S = 1.0
BATCH_SIZE = 64


def overhead(model: str) -> None:
    """Send the same queries to a service and to a gateway in front of it, alternating."""
    with (
        target(None, "--model", model) as service,
        target(None, "--upstream", service.url) as front,
    ):
        asked = {"chat_id": "1", "user_prompt": "Hi", "max_new_tokens": 1}
        times: dict[str, list[float]] = {service.url: [], front.url: []}
        with closing(service.connect()) as to_service, closing(front.connect()) as to_front:
            for _ in range(NUM_ASKED):
                times[service.url].append(post(to_service, "/chat", asked).total_s)
                times[front.url].append(post(to_front, "/chat", asked).total_s)
        alone, through = (1000 * statistics.median(values) for values in times.values())
        print_line(f"/chat: {alone:.1f} ms direct, {through:.1f} ms through the gateway")
        batches: dict[str, list[float]] = {service.url: [], front.url: []}
        for server in (service, front) * 3:
            batches[server.url].append(batch_s(server))
        alone, through = map(min, batches.values())
        print_line(f"batch of {NUM_BATCH}: {alone:.2f} s direct, {through:.2f} s via the gateway")


def batch_s(server: Target) -> float:
    """The seconds that a batch takes."""
    queries = [
        {"chat_id": str(number), "user_prompt": prompt, "max_new_tokens": 16}
        for number, prompt in enumerate(prompts(NUM_BATCH))
    ]
    with closing(server.connect()) as connection:
        return post(connection, "/generate_batch", {"queries": queries}).total_s


def workers(nums: list[int]) -> None:
    """Measure throughput with various numbers of simulated services, ten batches for each."""
    for num in nums:
        command = [sys.executable, "-m", "benchmarks.gateway", "simulate", str(num)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as popen:
            assert popen.stdout is not None
            urls = tuple(json.loads(popen.stdout.readline()))
            with closing(open_remote(RemoteSettings(urls))) as backend:
                time.sleep(1)  # until all services are known to be healthy
                queries = [
                    Query(str(n), (Message("user", f"What is {n} plus {n}?"),))
                    for n in range(10 * num * BATCH_SIZE)
                ]
                started = time.perf_counter()
                num_answered = sum(not r.is_error for r in answer_all(queries, backend))
                rate = num_answered / (time.perf_counter() - started)
            popen.terminate()
        ideal = num * BATCH_SIZE / BATCH_S
        print_line(f"{num} services: {rate:,.0f} of {ideal:,.0f} queries/s, {rate / ideal:.0%}")


async def simulate(num: int) -> None:
    """Run simulated services, each of which takes a fixed time per batch, one batch at a time."""
    servers = [await asyncio.start_server(simulated(), "127.0.0.1") for _ in range(num)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    print_line(json.dumps([f"http://127.0.0.1:{port}" for port in ports]))
    await asyncio.gather(*(server.serve_forever() for server in servers))


def simulated() -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """One service: a minimal HTTP server without /v1/models."""
    computing = asyncio.Lock()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                num_bytes = int((head.partition(b"content-length:")[2] or b"0").split()[0])
                queries = json.loads(await reader.readexactly(num_bytes) or b"{}").get("queries")
                if queries:
                    async with computing:
                        await asyncio.sleep(BATCH_S * len(queries) / BATCH_SIZE)
                writer.write(reply(queries))
        except (OSError, asyncio.IncompleteReadError):
            writer.close()

    return serve


def reply(queries: list[Any] | None) -> bytes:
    """The response to a batch, or 404 without queries."""
    responses = [{"chat_id": q["chat_id"], "response": "A sum."} for q in queries or ()]
    body = json.dumps({"responses": responses}).encode()
    status = "200 OK" if queries else "404 Not Found"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["overhead", *rest]:
            overhead(rest[0] if rest else DEFAULT_MODEL)
        case ["workers", *rest]:
            workers([int(num) for num in rest] or [1, 4, 16, 64])
        case ["simulate", num]:
            asyncio.run(simulate(int(num)))
        case _:
            raise SystemExit(__doc__)
