"""What a benchmark times, and what becomes of its readings."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from smolcli.cli.options import option
from smolcli.errors import UsageError
from smolcli.settings import BenchPlan

_bench = functools.partial(option, panel="Benchmark")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What a benchmark times, and what becomes of its readings."""

    compare: Annotated[
        Literal["none", "transformers"],
        _bench("--compare", help="Time this on the same work, taking turns."),
    ] = "none"
    prompts: Annotated[
        str, _bench("--prompts", help="Lengths of the prompts to be read, in words: 128,1024.")
    ] = "128,1024"
    sizes: Annotated[
        str, _bench("--sizes", help="How many answers are written at once: 1,8,32,64.")
    ] = "1,8,32,64"
    questions: Annotated[
        int, _bench("--questions", help="How many of the 64 real questions to ask.", least=0)
    ] = 64
    runs: Annotated[int, _bench("--runs", help="How often; medians are shown.", least=1)] = 3
    json: Annotated[
        Path | None, _bench("--json", help="All readings and the machine, to a file.")
    ] = None
    plot: Annotated[
        Path | None, _bench("--plot", help="A picture of the medians, .svg or .png.")
    ] = None
    peers: Annotated[
        Path | None, _bench("--peers", help="Lines that benchmarks/peer_*.py printed, to be shown.")
    ] = None

    def plan(self) -> BenchPlan:
        """What is to be timed.

        Raises:
            UsageError: a list that is none.
        """
        prompts, sizes = _numbers("--prompts", self.prompts), _numbers("--sizes", self.sizes)
        return BenchPlan(prompts, sizes, min(self.questions, 64))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise UsageError(f"{name} must be whole numbers from 1 with commas between, not {text!r}")
    return numbers
