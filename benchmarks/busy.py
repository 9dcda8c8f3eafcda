"""Generation throughput on a machine that is busy with other programs.

    python -m benchmarks.busy
    python -m benchmarks.busy --runs 5 --levels 0,1,2,4,2n

A level is a number of busy loops of normal priority; `2n` is two loops at nice 19. Levels
alternate in every run, so that a slow phase of the machine affects all of them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from smolcli.bench.workload import long_prompt
from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Model
from smolcli.engine.sequence import Sequence
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Sampling
from smolcli.weights.loader import load_model, resolve_model_config
from smolcli.weights.resolve import resolve

NUM_SEQUENCES = 32
NUM_TOKENS = 32
PROMPT_WORDS = 20


@contextmanager
def busy_loops(level: str) -> Iterator[None]:
    """Run programs that keep the CPU busy."""
    nice = ["nice", "-n", "19"] if level.endswith("n") else []
    command = [*nice, sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(int(level.rstrip("n")))]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens_per_s(model: Model, prompts: list[list[int]]) -> float:
    engine = Engine(model, NUM_SEQUENCES, 1 << 30)
    sequences = [Sequence(ids, Sampling(max_new_tokens=NUM_TOKENS)) for ids in prompts]
    began = time.perf_counter()
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    return sum(s.num_output for s in sequences) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--levels", default="0,1,2,4,2n")
    args = parser.parse_args()
    folder = resolve(DEFAULT_MODEL).folder
    config = resolve_model_config(EngineSettings(), folder)
    model = load_model(folder, config.dtype, config.device, config.kernels, config.threads)
    chat = ChatTokenizer.load(folder)
    turns = range(NUM_SEQUENCES)
    prompts = [chat.encode(long_prompt(PROMPT_WORDS, turn).messages) for turn in turns]
    levels = args.levels.split(",")
    found: dict[str, list[float]] = {level: [] for level in levels}
    for _ in range(args.runs):
        for level in levels:
            with busy_loops(level):
                found[level].append(tokens_per_s(model, prompts))
    idle = statistics.median(found[levels[0]])
    table = Table("loops", "median tokens/s", "worst", "worst of idle", box=None)
    for level, values in found.items():
        median, worst = statistics.median(values), min(values)
        table.add_row(level, f"{median:,.0f}", f"{worst:,.0f}", f"{worst / idle:.0%}")
    Console().print(table)
    Console().print(f"{config.threads} threads, {os.cpu_count()} CPUs, {config.dtype}")


if __name__ == "__main__":
    main()
