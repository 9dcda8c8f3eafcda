"""Memory of a server under long mixed load with disconnecting clients and invalid requests.

python -m benchmarks.serve_soak --seconds 600
"""

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

import psutil

from benchmarks.server_harness import Target, post, prompts, target

PROMPTS = prompts(64)


def use(server: Target, seed: int, until: float, outcomes: Counter[str]) -> None:
    """One client: queries, batches, streams, invalid requests and disconnects."""

    def ask(path: str, value: Any, **headers: str) -> None:
        outcomes[f"{path} {post(connection, path, value, **headers).status}"] += 1

    rng = random.Random(seed)
    while time.monotonic() < until:
        connection = server.connect()
        asked: dict[str, Any] = {"chat_id": "1", "user_prompt": rng.choice(PROMPTS)}
        asked |= {"max_new_tokens": rng.choice([4, 32, 128])}
        match rng.randrange(5):
            case 0:
                ask("/chat", asked)
            case 1:
                ask("/chat/batched", {"queries": [asked] * rng.randrange(1, 9)})
            case 2:
                headers = {"Accept": "application/x-ndjson"}
                ask("/generate_batch", {"queries": [asked, {}]}, **headers)
            case 3:
                ask("/chat", {"chat_id": rng.random()})
            case 4:
                body = json.dumps(asked).encode()
                connection.request("POST", "/chat", body, {"Content-Type": "application/json"})
                time.sleep(rng.random())
                outcomes["/chat disconnected"] += 1
        connection.close()


def measure(num_clients: int, seconds: float, every_s: float) -> dict[str, Any]:
    """Sample the memory of a new server under load."""
    with target(None) as server:
        assert server.process
        process = psutil.Process(server.process.pid)
        until = time.monotonic() + seconds
        outcomes: Counter[str] = Counter()
        clients = [
            threading.Thread(target=use, args=(server, n, until, outcomes))
            for n in range(num_clients)
        ]
        for client in clients:
            client.start()
        samples: dict[int, float] = {}
        while (left_s := until - time.monotonic()) > 0:
            samples[round(seconds - left_s)] = round(process.memory_info().rss / 1e6, 1)
            time.sleep(min(every_s, left_s))
        for client in clients:
            client.join()
        samples[round(seconds)] = round(process.memory_info().rss / 1e6, 1)
        return {
            "requests": dict(outcomes),
            "megabytes_at_second": samples,
            "growth_after_first_minute": growth(samples),
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }


def growth(samples: dict[int, float]) -> float | None:
    """The last sample relative to the first one after a minute of warm-up; None if too short."""
    settled = [megabytes for second, megabytes in samples.items() if second >= 60]
    return round(settled[-1] / settled[0], 3) if settled else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=20, help="seconds between samples")
    arguments = parser.parse_args()
    summary = measure(arguments.clients, arguments.seconds, arguments.every)
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
