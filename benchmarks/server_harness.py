"""The harness of the server benchmarks: starts a server, and measures requests to it."""

import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from smolcli.bench.workload import QUESTIONS

TIMEOUT_S = 600


@dataclass(frozen=True)
class Exchange:
    """One request: its start, the seconds to the first line and to the end, and the response."""

    began: float
    first_s: float
    total_s: float
    status: int
    body: Any

    @property
    def ended(self) -> float:
        return self.began + self.total_s


@dataclass(frozen=True)
class Target:
    """The server under test; `process` is None if it was already running."""

    url: str
    process: subprocess.Popen[bytes] | None

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname
        return parts.hostname, parts.port or 80

    def connect(self, timeout_s: float = TIMEOUT_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=timeout_s)


@contextmanager
def target(url: str | None, *args: str) -> Iterator[Target]:
    """The server at `url` or, without one, a new server that is stopped afterwards.

    Deduplication is off, because there are only 64 distinct questions.
    """
    if url is not None:
        yield Target(url.rstrip("/"), None)
        return
    options = ["--port", "0", "--no-dedupe", *args]
    command = [sys.executable, "-m", "smolcli", "serve", *options]
    with (
        tempfile.NamedTemporaryFile("r") as log,
        open(log.name, "w") as log_writer,
        subprocess.Popen(command, stderr=log_writer) as popen,
    ):
        try:
            yield Target(_url_when_ready(popen, Path(log.name)), popen)
        finally:
            popen.terminate()


def _url_when_ready(popen: subprocess.Popen[bytes], log: Path) -> str:
    while not (found := re.search(r"ready at (http://[\w.:]+)", text := log.read_text())):
        if popen.poll() is not None:
            raise SystemExit(f"the server exited: {text}")
        time.sleep(0.1)
    return found[1]


def post(connection: http.client.HTTPConnection, path: str, value: Any, **headers: str) -> Exchange:
    """Send JSON and read the whole response; the body of a stream is its lines."""
    began = time.perf_counter()
    connection.request(
        "POST", path, json.dumps(value).encode(), {"Content-Type": "application/json"} | headers
    )
    response = connection.getresponse()
    first = response.readline()
    first_s = time.perf_counter() - began
    text = first + response.read()
    total_s = time.perf_counter() - began
    is_json = response.headers.get_content_type() == "application/json"
    body = json.loads(text) if is_json else text.decode().splitlines()
    return Exchange(began, first_s, total_s, response.status, body)


def prompts(number: int) -> list[str]:
    """The first questions of the reference set, repeated if there are more than 64."""
    lines = QUESTIONS.read_text("utf-8").splitlines()
    return [json.loads(line)["user_prompt"] for line in islice(cycle(lines), number)]


def print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def percentiles(values: list[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile in milliseconds."""
    ordered = sorted(values)
    return {
        f"p{share}_ms": round(1000 * ordered[min(len(ordered) * share // 100, len(ordered) - 1)], 1)
        for share in (50, 95, 99)
        if ordered
    }
