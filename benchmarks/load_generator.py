"""A load generator: concurrent clients, the outcome of each request, and the server's health."""

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.server_harness import Exchange, Target, post, prompts

TIMEOUT_S = 150.0  # a request that takes longer counts as hung
PROMPTS = prompts(64)


def query(number: int, max_new_tokens: int = 48, prompt: str | None = None) -> dict[str, Any]:
    asked = prompt or PROMPTS[number % len(PROMPTS)]
    return {"chat_id": str(number), "user_prompt": asked, "max_new_tokens": max_new_tokens}


def outcomes_of(exchange: Exchange) -> list[str]:
    """The outcome of a request, or of each query of a batch."""
    body = exchange.body
    if exchange.status != 200:
        return [f"{exchange.status} {body['error_code']}"]
    if "responses" in body:
        return [f"item {item.get('error_code', 'answered')}" for item in body["responses"]]
    return ["answered"]


def ask(server: Target, value: Any, path: str = "/chat") -> list[str]:
    try:
        return outcomes_of(post(server.connect(TIMEOUT_S), path, value))
    except TimeoutError:
        return ["HUNG"]
    except (OSError, http.client.HTTPException) as exc:
        return [f"disconnected ({type(exc).__name__})"]


class LoadGenerator:
    """Sends requests from concurrent clients."""

    def __init__(self, server: Target) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(256)
        self._asked: list[Future[list[str]]] = []

    def ask(self, values: Sequence[Any], path: str = "/chat") -> None:
        self._asked += [self._pool.submit(ask, self._server, value, path) for value in values]

    def outcomes(self) -> Counter[str]:
        """Wait for all requests and count their outcomes."""
        return Counter(outcome for asked in self._asked for outcome in asked.result())


def get(server: Target, path: str) -> tuple[int, str]:
    connection = server.connect(TIMEOUT_S)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def num_unfinished(server: Target) -> int:
    """Number of queries that run or wait in the engine."""
    samples = dict(line.rsplit(" ", 1) for line in get(server, "/metrics")[1].splitlines())
    return sum(int(float(samples[f"smol_requests_{kind}"])) for kind in ("running", "waiting"))


def wait_until(condition: Callable[[], bool]) -> float:
    """Wait for a condition and return the seconds that it took."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > TIMEOUT_S:
            raise SystemExit("the condition was not met in time")
        time.sleep(0.05)
    return time.perf_counter() - began


def check_health(server: Target) -> str:
    free_s = wait_until(lambda: num_unfinished(server) == 0)
    status, body = get(server, "/health")
    began = time.perf_counter()
    outcome = ask(server, query(0, 8))[0]
    seconds = time.perf_counter() - began
    health = json.loads(body)["status"]
    return (
        f"all slots free after {free_s:.1f} s; /health {status} {health}; "
        f"next query {outcome} in {seconds:.2f} s"
    )
