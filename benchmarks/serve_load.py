"""Errors, latency and throughput under concurrent clients, compared with `smol run`.

    python -m benchmarks.serve_load                  # 64 clients for 60 seconds
    python -m benchmarks.serve_load --clients 16 --seconds 20 --url http://127.0.0.1:8000

Three of four clients use /chat; the fourth streams from /v1/chat/completions to measure the time to
the first token. Only requests that finish after the warm-up and within the measured time count.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.server_harness import Exchange, Target, percentiles, post, prompts, target
from smolcli.engine.hardware import num_cores

MAX_NEW_TOKENS = 128
PROMPTS = prompts(64)


class Load:
    """Clients that send one query after another until the time is up."""

    def __init__(self, server: Target, model: str, num_clients: int) -> None:
        self._server = server
        self._model = model
        self._lock = threading.Lock()
        self.num_asked = 0
        self.cpu_share = 0.0  # share of the machine that the load generator uses
        self._is_over = False
        self.answered: list[Exchange] = []
        self.streamed: list[Exchange] = []
        self.failures: Counter[str] = Counter()
        self._threads = [
            threading.Thread(target=self._client, args=(n % 4 == 3,)) for n in range(num_clients)
        ]

    def run(self, warm_up_s: float, seconds: float) -> tuple[float, float]:
        """Put load on the server; returns when the measured time began and ended."""
        for thread in self._threads:
            thread.start()
        time.sleep(warm_up_s)
        began, used = time.perf_counter(), time.process_time()
        time.sleep(seconds)
        ended = time.perf_counter()
        self.cpu_share = (time.process_time() - used) / (ended - began) / num_cores()
        self._is_over = True
        for thread in self._threads:
            thread.join()
        return began, ended

    def _client(self, streams: bool) -> None:
        connection = self._server.connect()
        while not self._is_over:
            with self._lock:
                number = self.num_asked
                self.num_asked += 1
            try:
                (self._stream if streams else self._chat)(connection, number)
            except (OSError, http.client.HTTPException, ValueError) as exc:
                self.failures[f"{type(exc).__name__}: {exc}"] += 1
                connection.close()

    def _chat(self, connection: http.client.HTTPConnection, number: int) -> None:
        prompt = PROMPTS[number % len(PROMPTS)]
        asked = {"chat_id": str(number), "user_prompt": prompt, "max_new_tokens": MAX_NEW_TOKENS}
        exchange = post(connection, "/chat", asked)
        if exchange.status != 200:
            self.failures[f"{exchange.status} {exchange.body.get('error_code')}"] += 1
            time.sleep(1)
        elif exchange.body["chat_id"] != str(number):
            self.failures["answer to another question"] += 1
        else:
            self.answered.append(exchange)

    def _stream(self, connection: http.client.HTTPConnection, number: int) -> None:
        asked = {
            "model": self._model,
            "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
            "max_tokens": MAX_NEW_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        exchange = post(connection, "/v1/chat/completions", asked)
        if exchange.status != 200:
            self.failures[f"{exchange.status} {exchange.body['error']['code']}"] += 1
            time.sleep(1)
        elif "data: [DONE]" not in exchange.body:
            self.failures["truncated stream"] += 1
        else:
            self.streamed.append(exchange)


def num_tokens(exchange: Exchange) -> int:
    """The number of tokens of an answer."""
    if isinstance(exchange.body, dict):
        return int(exchange.body["usage"]["completion_tokens"])
    last = [line for line in exchange.body if line.startswith("data: {")][-1]
    return int(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"])


def stream_id(exchange: Exchange) -> str:
    """The id of a streamed answer."""
    return str(json.loads(exchange.body[0].removeprefix("data: "))["id"])


def model_of(server: Target) -> str:
    connection = server.connect()
    connection.request("GET", "/v1/models")
    return str(json.loads(connection.getresponse().read())["data"][0]["id"])


def measure(url: str | None, num_clients: int, warm_up_s: float, seconds: float) -> dict[str, Any]:
    """Measure a server under load."""
    with target(url) as server:
        load = Load(server, model_of(server), num_clients)
        began, ended = load.run(warm_up_s, seconds)
    counted = [e for e in load.answered + load.streamed if began <= e.ended < ended]
    tokens = sum(map(num_tokens, counted))
    return {
        "clients": num_clients,
        "seconds": round(ended - began, 1),
        "measured_answers": len(counted),
        "asked": load.num_asked,  # including the warm-up
        "answered": len(load.answered) + len(load.streamed),
        "different_streams": len({stream_id(e) for e in load.streamed}),
        "streams": len(load.streamed),
        "failures": dict(load.failures),
        "cpu_share_of_clients": round(load.cpu_share, 3),
        "tokens_per_second": round(tokens / (ended - began), 1),
        "latency": percentiles([e.total_s for e in counted]),
        "first_token": percentiles([e.first_s for e in load.streamed if began <= e.ended < ended]),
    }


def smol_run(number: int) -> float:
    """Tokens per second of `smol run` on `number` questions."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "q.jsonl"), Path(folder, "r.jsonl")
        lines = ({"chat_id": str(n), "user_prompt": p} for n, p in enumerate(prompts(number)))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ["--max-new-tokens", str(MAX_NEW_TOKENS), "--no-dedupe", "-q", "-o", str(output)]
        subprocess.run([sys.executable, "-m", "smolcli", "run", str(path), *options], check=True)
        manifest = json.loads(Path(f"{output}.manifest.json").read_text())
        return float(manifest["report"]["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", help="a running server; starts one by default")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=10, help="warm-up, in seconds")
    arguments = parser.parse_args()
    summary = measure(arguments.url, arguments.clients, arguments.warm_up, arguments.seconds)
    if arguments.url is None:
        alone = smol_run(max(summary["measured_answers"], arguments.clients))
        share = round(summary["tokens_per_second"] / alone, 3)
        summary |= {"smol_run_tokens_per_second": alone, "share_of_smol_run": share}
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
