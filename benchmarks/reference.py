"""Throughput and latency of smol and of transformers' `generate` on 64 real questions.

    python -m benchmarks.reference                       # bfloat16: smol, static batches of 32
    python -m benchmarks.reference --dtype float32 --systems smol,static,sequential
    python -m benchmarks.reference --systems smol,static --mixed

All questions are submitted at once; latency is measured from then to the answer.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from smolcli.backends.local import LocalBackend, open_local
from smolcli.batch.pipeline import answer_all
from smolcli.bench.transformers_peer import STATIC_BATCH, TransformersPeer
from smolcli.bench.workload import QUESTIONS
from smolcli.engine.hardware import num_cores
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.types import Message, Query, Sampling


@dataclass(frozen=True)
class Outcome:
    """Measurements of one system."""

    system: str
    dtype: str
    tokens: int
    seconds: float
    model_calls: int
    latency_p50_s: float
    latency_p95_s: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def load_queries(mixed: bool, max_new_tokens: int) -> list[Query]:
    """The 64 questions; if mixed, every fourth answer has up to 256 tokens, the others 16."""
    queries = []
    for number, line in enumerate(QUESTIONS.read_text("utf-8").splitlines()):
        length = (256 if number % 4 == 0 else 16) if mixed else max_new_tokens
        turn = Message("user", json.loads(line)["user_prompt"])
        queries.append(Query(str(number), (turn,), Sampling(max_new_tokens=length)))
    return queries


def outcome(
    system: str, dtype: str, tokens: int, began: float, calls: int, latencies: list[float]
) -> Outcome:
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return Outcome(system, dtype, tokens, time.perf_counter() - began, calls, cuts[49], cuts[94])


def run_smol(queries: list[Query], backend: LocalBackend, dtype: str) -> Outcome:
    """Answer with smol's pipeline, as `smol run` does."""
    calls, began = backend.counters().model_calls, time.perf_counter()
    results = list(answer_all(queries, backend))
    assert not any(r.is_error for r in results)
    tokens = sum(r.usage.completion_tokens for r in results if r.usage)
    latencies = [r.timings.total_s for r in results if r.timings]
    return outcome("smol", dtype, tokens, began, backend.counters().model_calls - calls, latencies)


def run_transformers(
    queries: list[Query], peer: TransformersPeer, dtype: str, size: int
) -> Outcome:
    """Answer with `generate` in static batches."""
    began = time.perf_counter()
    run = peer.answer(queries, size)
    name = "transformers, sequential" if size == 1 else f"transformers, batches of {size}"
    return outcome(name, dtype, run.tokens, began, run.model_calls, run.latencies)


class Systems:
    """The systems under test, each on a thread that ends with its turn.

    A thread that has used OpenMP keeps its workers, and the workers of two threads compete.
    """

    def __init__(self, queries: list[Query], args: argparse.Namespace) -> None:
        self._queries = queries
        self._warm_up = [replace(q, sampling=Sampling(max_new_tokens=4)) for q in queries]
        self._settings = EngineSettings(args.model, args.dtype, max_batch_size=args.max_batch_size)
        self._peer: TransformersPeer | None = None

    def smol(self) -> Outcome:
        """smol, after a warm-up."""
        with closing(open_local(self._settings)) as backend:
            list(answer_all(self._warm_up, backend))
            return run_smol(self._queries, backend, self._settings.dtype)

    def static(self) -> Outcome:
        """transformers in static batches."""
        return self._transformers(STATIC_BATCH)

    def sequential(self) -> Outcome:
        """transformers, one question at a time."""
        return self._transformers(1)

    def _transformers(self, size: int) -> Outcome:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._run_transformers, size).result()

    def _run_transformers(self, size: int) -> Outcome:
        if self._peer is None:
            settings = self._settings
            self._peer = TransformersPeer(
                {
                    "model": settings.model,
                    "dtype": settings.dtype,
                    "device": "cpu",
                    "threads": num_cores(),
                }
            )
        self._peer.answer(self._warm_up[: max(size, 2)], size)
        return run_transformers(self._queries, self._peer, self._settings.dtype, size)


def measure(names: list[str], queries: list[Query], args: argparse.Namespace) -> list[Outcome]:
    """Measure the systems in turn, `--runs` times; the slow sequential one only once."""
    torch.manual_seed(0)
    systems = Systems(queries, args)
    return [
        getattr(systems, name)()
        for turn in range(args.runs)
        for name in names
        if turn == 0 or name != "sequential"
    ]


def medians(outcomes: list[Outcome]) -> list[Outcome]:
    """The run with the median throughput of each system."""
    groups = {o.system: [p for p in outcomes if p.system == o.system] for o in outcomes}
    return [sorted(g, key=lambda o: o.seconds)[len(g) // 2] for g in groups.values()]


def show(outcomes: list[Outcome]) -> None:
    table = Table("system", "dtype", "tokens/s", "ratio", "model calls", "p50", "p95", "tokens")
    for o in outcomes:
        ratio = outcomes[0].tokens_per_second / o.tokens_per_second
        table.add_row(
            o.system,
            o.dtype,
            f"{o.tokens_per_second:.0f}",
            f"{ratio:.2f}",
            f"{o.model_calls:,}",
            f"{o.latency_p50_s:.1f} s",
            f"{o.latency_p95_s:.1f} s",
            f"{o.tokens:,}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, peak memory {peak_mib():.0f} MiB (all systems together)"
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--systems", default="smol,static")
    parser.add_argument("--max-batch-size", type=int, default=EngineSettings().max_batch_size)
    parser.add_argument("--questions", type=int, default=64, help="number of questions")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--mixed", action="store_true", help="answers of 16 and of 256 tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all measurements")
    args = parser.parse_args()
    queries = load_queries(args.mixed, args.max_new_tokens)[: args.questions]
    outcomes = measure(args.systems.split(","), queries, args)
    show(medians(outcomes))
    if args.json:
        args.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
