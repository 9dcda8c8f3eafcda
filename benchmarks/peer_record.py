"""What the benchmarks of other systems share: options, the reference questions, the timing."""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

QUESTIONS = Path(__file__).parents[1] / "smolcli" / "bench" / "reference.jsonl"
WARM_UP_TOKENS = 4

Prompt = TypeVar("Prompt")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all systems share."""
    parser.add_argument("--questions", type=int, default=64, help="how many of the 64 to ask")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--ignore-eos", action="store_true", help="make all answers equally long")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--turns",
        action="store_true",
        help="run once for every line of standard input, as benchmarks.turns asks it to",
    )


def read_questions(count: int, turn: int) -> list[str]:
    """The first of the 64 reference questions, numbered by the turn.

    A prefix cache would otherwise hold whole prompts from the second turn on, which favours the
    systems that have one; numbered, they share the system prompt and nothing else.
    """
    lines = QUESTIONS.read_text("utf-8").splitlines()[:count]
    return [f"{turn}. {json.loads(line)['user_prompt']}" for line in lines]


def measure(
    encode: Callable[[str], Prompt],
    answer: Callable[[list[Prompt], int], int],
    args: argparse.Namespace,
    **facts: Any,
) -> None:
    """Time some runs and print one line of JSON, which `smol bench --peers` reads.

    With --turns, print a line when the model is loaded and one for every run instead.

    Args:
        encode: makes the prompt of a question; not timed.
        answer: answers all prompts with at most so many tokens each, and returns the number of
            generated tokens.
        args: the parsed options of `add_options`.
        facts: what else to print, such as the name of the system.
    """

    def run(turn: int, limit: int) -> dict[str, Any]:
        prompts = [encode(question) for question in read_questions(args.questions, turn)]
        started = time.perf_counter()
        tokens = answer(prompts, limit)
        seconds = time.perf_counter() - started
        return {"tokens": tokens, "seconds": seconds, "peak_mib": peak_mib()}

    run(0, WARM_UP_TOKENS)
    if args.turns:
        _print(facts)
        for turn, _ in enumerate(sys.stdin, 1):
            _print(run(turn, args.max_new_tokens))
        return
    runs = [run(turn, args.max_new_tokens) for turn in range(1, args.runs + 1)]
    rates = [done["tokens"] / done["seconds"] for done in runs]
    record = facts | {
        "tokens": runs[0]["tokens"],
        "runs": [round(rate, 1) for rate in rates],
        "tokens_per_second": round(statistics.median(rates), 1),
        "peak_mib": round(peak_mib()),
    }
    _print(record)


def peak_mib() -> float:
    """The most memory that this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _print(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
