"""Time per query and memory for files of 100, 1,000 and 10,000 queries.

    python -m benchmarks.growth
    python -m benchmarks.growth 100 1000 10000 --max-new-tokens 8

All questions differ, so that deduplication has no effect.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import closing

import psutil
from rich.console import Console
from rich.table import Table

from smolcli.backends.local import open_local
from smolcli.batch.pipeline import answer_all
from smolcli.bench.workload import WORDS, stories
from smolcli.settings import EngineSettings
from smolcli.types import Message, Query, Sampling


def questions(number: int, max_new_tokens: int) -> Iterator[Query]:
    for n in range(number):
        text = f"What do you know of {n + 10} years, a {WORDS[n % 8]} and a {WORDS[n // 8 % 8]}?"
        yield Query(str(n), (Message("user", text),), Sampling(max_new_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--max-new-tokens", type=int, default=8)
    args = parser.parse_args()
    table = Table("questions", "questions/s", "tokens/s", "memory")
    with closing(open_local(EngineSettings())) as backend:
        for future in [backend.submit(query) for query in stories(64, 2)]:
            future.result()
        for number in args.numbers:
            tokens, began = 0, time.perf_counter()
            for result in answer_all(questions(number, args.max_new_tokens), backend):
                assert not result.is_error, result.error
                tokens += result.usage.completion_tokens if result.usage else 0
            seconds = time.perf_counter() - began
            mib = psutil.Process().memory_info().rss >> 20
            rates = (f"{number / seconds:.1f}", f"{tokens / seconds:.0f}")
            table.add_row(f"{number:,}", *rates, f"{mib:,} MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
