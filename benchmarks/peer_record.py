"""What the benchmarks of other systems share: the reference questions and the line they print."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).parents[1] / "smolcli" / "bench" / "reference.jsonl"


def read_questions() -> list[str]:
    """The 64 reference questions."""
    lines = QUESTIONS.read_text("utf-8").splitlines()
    return [json.loads(line)["user_prompt"] for line in lines]


def measure(answer: Callable[[], int], num_runs: int, **facts: Any) -> None:
    """Time some runs and print one line of JSON, which `smol bench --peers` reads.

    Args:
        answer: answers all questions and returns the number of generated tokens.
        num_runs: how often to call it.
        facts: what else to print, such as the name of the system.
    """
    runs = []
    for _ in range(num_runs):
        started = time.perf_counter()
        tokens = answer()
        runs.append((tokens, time.perf_counter() - started))
    rates = [tokens / seconds for tokens, seconds in runs]
    record = facts | {
        "tokens": runs[0][0],
        "runs": [round(rate, 1) for rate in rates],
        "tokens_per_second": round(statistics.median(rates), 1),
    }
    sys.stdout.write(json.dumps(record) + "\n")
