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
from smolcli.bench.work import QUESTIONS
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message, Query, Sampling
from smolcli.weights.resolve import resolve

STATIC_BATCH = 32


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
    queries: list[Query], chat: ChatTokenizer, model: torch.nn.Module, dtype: str, size: int
) -> Outcome:
    """Answer with `generate` in left-padded batches of a fixed size."""
    began, tokens, calls = time.perf_counter(), 0, 0
    latencies: list[float] = []
    for at in range(0, len(queries), size):
        batch = queries[at : at + size]
        prompts = [chat.encode(q.messages) for q in batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        longest = max(q.sampling.max_new_tokens for q in batch)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=2
        )[:, width:]
        calls += out.shape[1]
        for row, query in zip(out.tolist(), batch, strict=True):
            row = row[: query.sampling.max_new_tokens]
            tokens += row.index(2) + 1 if 2 in row else len(row)
            latencies.append(time.perf_counter() - began)
    name = "transformers, sequential" if size == 1 else f"transformers, batches of {size}"
    return outcome(name, dtype, tokens, began, calls, latencies)


class Systems:
    """The systems under test, each on a thread that ends with its turn.

    A thread that has used OpenMP keeps its workers, and the workers of two threads compete.
    """

    def __init__(self, queries: list[Query], args: argparse.Namespace) -> None:
        self._queries = queries
        self._warm_up = [replace(q, sampling=Sampling(max_new_tokens=4)) for q in queries]
        self._settings = EngineSettings(args.model, args.dtype, max_batch_size=args.max_batch_size)
        self._folder = resolve(args.model).folder
        self._chat = ChatTokenizer.load(self._folder)
        self._model: torch.nn.Module | None = None

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
        if self._model is None:
            from transformers import AutoModelForCausalLM

            dtype = getattr(torch, self._settings.dtype)
            self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=dtype)
        run_transformers(self._warm_up[: max(size, 2)], self._chat, self._model, "", size)
        return run_transformers(self._queries, self._chat, self._model, self._settings.dtype, size)


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
