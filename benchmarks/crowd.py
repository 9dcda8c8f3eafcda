"""Clients that ask at the same time, what becomes of it, and how the server is afterwards."""

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.serving import Exchange, Target, post, prompts

PATIENCE_S = 150.0  # what takes longer hangs
PROMPTS = prompts(64)


def query(number: int, max_new_tokens: int = 48, prompt: str | None = None) -> dict[str, Any]:
    asked = prompt or PROMPTS[number % len(PROMPTS)]
    return {"chat_id": str(number), "user_prompt": asked, "max_new_tokens": max_new_tokens}


def fates_of(exchange: Exchange) -> list[str]:
    """What became of a request, or of each query of a batch."""
    body = exchange.body
    if exchange.status != 200:
        return [f"{exchange.status} {body['error_code']}"]
    if "responses" in body:
        return [f"item {item.get('error_code', 'answered')}" for item in body["responses"]]
    return ["answered"]


def ask(server: Target, value: Any, path: str = "/chat") -> list[str]:
    try:
        return fates_of(post(server.connect(PATIENCE_S), path, value))
    except TimeoutError:
        return ["HUNG"]
    except (OSError, http.client.HTTPException) as exc:
        return [f"cut off ({type(exc).__name__})"]


class Crowd:
    """Clients that ask at the same time."""

    def __init__(self, server: Target) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(256)
        self._asked: list[Future[list[str]]] = []

    def ask(self, values: Sequence[Any], path: str = "/chat") -> None:
        self._asked += [self._pool.submit(ask, self._server, value, path) for value in values]

    def fates(self) -> Counter[str]:
        """Wait for all of them."""
        return Counter(fate for asked in self._asked for fate in asked.result())


def get(server: Target, path: str) -> tuple[int, str]:
    connection = server.connect(PATIENCE_S)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def num_held(server: Target) -> int:
    """How many queries run or wait in the engine."""
    samples = dict(line.rsplit(" ", 1) for line in get(server, "/metrics")[1].splitlines())
    return sum(int(float(samples[f"smol_requests_{kind}"])) for kind in ("running", "waiting"))


def until(condition: Callable[[], bool]) -> float:
    """Wait until something is so; returns the seconds that it took."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > PATIENCE_S:
            raise SystemExit("it hangs")
        time.sleep(0.05)
    return time.perf_counter() - began


def aftermath(server: Target) -> str:
    free_s = until(lambda: num_held(server) == 0)
    status, body = get(server, "/health")
    began = time.perf_counter()
    fate = ask(server, query(0, 8))[0]
    seconds = time.perf_counter() - began
    health = json.loads(body)["status"]
    return (
        f"all slots free after {free_s:.1f} s; /health {status} {health}; "
        f"next question {fate} in {seconds:.2f} s"
    )
