"""Latency between the tokens of running answers while a long prompt is processed in chunks.

    python -m benchmarks.stall
    python -m benchmarks.stall --prompt-words 7000 --answers 32

Measured as the time between two pieces of text in the stream of one answer.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import closing

from rich.console import Console
from rich.table import Table

from smolcli.backends.base import Backend
from smolcli.backends.local import open_local
from smolcli.bench.workload import long_prompt, stories
from smolcli.settings import EngineSettings

ANSWER_TOKENS = 256
PIECES_BEFORE = 20


class Gaps:
    """The times between pieces of text of each answer."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def callback(self) -> Callable[[str], None]:
        """A callback for the stream of one answer."""
        last = 0.0

        def record(_: str) -> None:
            nonlocal last
            now = time.perf_counter()
            if last:
                self.spans.append((last, now))
            last = now

        return record

    def between(self, began: float, ended: float) -> list[float]:
        """Gaps that overlap an interval, in ms, in ascending order."""
        return sorted(1000 * (b - a) for a, b in self.spans if b > began and a < ended)


def measure(backend: Backend, num_answers: int, num_words: int) -> None:
    gaps = Gaps()
    answers = [backend.submit(q, gaps.callback()) for q in stories(num_answers, ANSWER_TOKENS)]
    while len(gaps.spans) < PIECES_BEFORE * num_answers:
        time.sleep(0.01)
    arrived = time.perf_counter()
    result = backend.submit(long_prompt(num_words, 1)).result()
    done = time.perf_counter()
    for answer in answers:
        answer.result()
    num_tokens = result.usage.prompt_tokens if result.usage else 0
    table = Table("time between two pieces of text", "p50", "p99", "max")
    for name, stretch in (
        ("without a long prompt", (0.0, arrived)),
        ("during the long prompt", (arrived, done)),
    ):
        found = gaps.between(*stretch)
        cuts = statistics.quantiles(found, n=100, method="inclusive")
        table.add_row(name, *(f"{value:.0f} ms" for value in (cuts[49], cuts[98], found[-1])))
    console = Console()
    console.print(table)
    console.print(
        f"{num_answers} answers running; a prompt of {num_tokens:,} tokens "
        f"was processed in {done - arrived:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--prompt-words", type=int, default=3000)
    args = parser.parse_args()
    with closing(open_local(EngineSettings(prefix_cache_mb=0))) as backend:
        backend.submit(stories(1, 2)[0]).result()
        measure(backend, args.answers, args.prompt_words)


if __name__ == "__main__":
    main()
