"""What the benchmarks of other systems share: options, the reference questions, the timing."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).parents[1] / "smolcli" / "bench" / "reference.jsonl"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all systems share."""
    parser.add_argument("--questions", type=int, default=64, help="how many of the 64 to ask")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--turns",
        action="store_true",
        help="run once for every line of standard input, as benchmarks.busy asks for it",
    )


def read_questions(count: int = 64) -> list[str]:
    """The first of the 64 reference questions."""
    lines = QUESTIONS.read_text("utf-8").splitlines()[:count]
    return [json.loads(line)["user_prompt"] for line in lines]


def measure(answer: Callable[[], int], args: argparse.Namespace, **facts: Any) -> None:
    """Time some runs and print one line of JSON, which `smol bench --peers` reads.

    With --turns, print a line when the model is loaded and one for every run instead.

    Args:
        answer: answers all questions and returns the number of generated tokens.
        args: the parsed options of `add_options`.
        facts: what else to print, such as the name of the system.
    """

    def run() -> tuple[int, float]:
        started = time.perf_counter()
        tokens = answer()
        return tokens, time.perf_counter() - started

    if args.turns:
        _print(facts)
        for _ in sys.stdin:
            tokens, seconds = run()
            _print({"tokens": tokens, "seconds": seconds})
        return
    runs = [run() for _ in range(args.runs)]
    rates = [tokens / seconds for tokens, seconds in runs]
    record = facts | {
        "tokens": runs[0][0],
        "runs": [round(rate, 1) for rate in rates],
        "tokens_per_second": round(statistics.median(rates), 1),
    }
    _print(record)


def _print(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
