"""Throughput and memory of `smol run` with a backend that answers instantly.

python -m benchmarks.pipeline [LINES]
"""

import sys
import tempfile
import time
from pathlib import Path

import psutil

from smolcli.backends.dedup import deduplicated
from smolcli.batch.progress import LogProgress
from smolcli.batch.runner import run_file
from smolcli.settings import RunSettings
from tests.fakes import EchoBackend


class MemoryProgress(LogProgress):
    """Records the memory in use when the last result arrives."""

    num_bytes = 0

    def stop(self) -> None:
        self.num_bytes = psutil.Process().memory_info().rss


def main(num_lines: int) -> None:
    """Write a file of questions, answer it and print the throughput."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "queries.jsonl"), Path(folder, "results.jsonl")
        with source.open("w") as file:
            for number in range(num_lines):
                prompt = f"What is {number} plus {number}?"
                file.write(f'{{"chat_id": "{number}", "user_prompt": "{prompt}"}}\n')
        measuring, num_bytes = MemoryProgress(), psutil.Process().memory_info().rss
        started = time.perf_counter()
        statistics = run_file(RunSettings(source, output), deduplicated(EchoBackend), measuring)
        seconds = time.perf_counter() - started
        growth = (measuring.num_bytes - num_bytes) / 1e6
        sys.stdout.write(
            f"{statistics.num_answered:,} lines in {seconds:.2f} s: "
            f"{statistics.num_answered / seconds:,.0f} lines/s, memory grew by {growth:.1f} MB\n"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
