"""Latency of a short query on an idle server, and while it answers a batch of 200.

python -m benchmarks.serve_fairness
"""

import argparse
import json
import statistics
import sys
import threading
import time
from typing import Any

from benchmarks.server_harness import Target, percentiles, post, prompts, target

SHORT = {"user_prompt": "What is the capital of France?", "max_new_tokens": 16}


def ask(server: Target, number: int, is_running: threading.Event | None = None) -> list[float]:
    """Latencies of short queries sent one after another."""
    connection, latencies = server.connect(), []
    for index in range(number):
        if is_running is not None and not is_running.is_set():
            break
        exchange = post(connection, "/chat", SHORT | {"chat_id": str(index)})
        assert exchange.status == 200, exchange.body
        latencies.append(exchange.total_s)
        time.sleep(0.2)
    return latencies


def flood(server: Target, size: int, is_running: threading.Event) -> None:
    """Send one large batch."""
    queries = [
        {"chat_id": str(n), "user_prompt": prompt, "max_new_tokens": 128}
        for n, prompt in enumerate(prompts(size))
    ]
    exchange = post(server.connect(), "/chat/batched", {"queries": queries})
    is_running.clear()
    assert exchange.status == 200
    assert "partial_success" not in exchange.body


def measure(url: str | None, size: int, number: int) -> dict[str, Any]:
    """Latencies without the batch and with it."""
    with target(url) as server:
        ask(server, 3)
        idle = ask(server, number)
        is_running = threading.Event()
        is_running.set()
        batch = threading.Thread(target=flood, args=(server, size, is_running))
        began = time.perf_counter()
        batch.start()
        time.sleep(1)
        busy = ask(server, 100_000, is_running)[:-1]  # the last one may have outlived the batch
        batch.join()
        seconds = time.perf_counter() - began
    ratio = statistics.median(busy) / statistics.median(idle)
    return {
        "batch": size,
        "batch_seconds": round(seconds, 1),
        "idle": percentiles(idle) | {"number": len(idle)},
        "during_the_batch": percentiles(busy) | {"number": len(busy)},
        "ratio_of_medians": round(ratio, 2),
        "ratio_of_p95": round(percentiles(busy)["p95_ms"] / percentiles(idle)["p95_ms"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="a running server; starts one by default")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--number", type=int, default=20, help="questions without the batch")
    arguments = parser.parse_args()
    summary = measure(arguments.url, arguments.batch, arguments.number)
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
