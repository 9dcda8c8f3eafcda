"""`smol bench`: measure throughput on this machine."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from smolcli.cli.options import option, with_option_groups
from smolcli.cli.options.backend import ViaOptions, backend_opener
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.terminal import log_to_stderr
from smolcli.errors import UsageError
from smolcli.settings import BenchPlan

EXAMPLES = (
    "[bold]smol bench --compare transformers[/bold] takes a few minutes.\n\n"
    "[bold]smol bench --sizes 1,2,4,8,16,32,64,128 --max-batch-size 128 --plot speed.svg[/bold] "
    "plots throughput over batch size."
)
NUM_QUESTIONS = 64

_bench = functools.partial(option, panel="Benchmark")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure, and where to write the measurements."""

    compare: Annotated[
        Literal["none", "transformers"],
        _bench(
            "--compare", metavar="LIBRARY", help="Also measure this library, on the same workload."
        ),
    ] = "none"
    prompts: Annotated[
        str,
        _bench("--prompts", metavar="LIST", help="Lengths of prompts to process, in words."),
    ] = "128,1024"
    sizes: Annotated[
        str,
        _bench("--sizes", metavar="LIST", help="Batch sizes to measure."),
    ] = "1,8,32,64"
    questions: Annotated[
        int,
        _bench("--questions", metavar="N", help="Number of the 64 reference questions to answer.",
               min=0),
    ] = NUM_QUESTIONS  # fmt: skip
    runs: Annotated[
        int,
        _bench("--runs", metavar="N", help="Number of runs. The table shows medians.", min=1),
    ] = 3
    json: Annotated[
        Path | None,
        _bench(
            "--json",
            metavar="FILE",
            help="Write all measurements to this file as JSON.",
            variable="SMOL_BENCH_JSON",
        ),
    ] = None
    plot: Annotated[
        Path | None,
        _bench("--plot", metavar="FILE", help="Plot the medians to this .svg or .png file."),
    ] = None
    peers: Annotated[
        Path | None,
        _bench(
            "--peers",
            metavar="FILE",
            help="File with the output of benchmarks/peer_*.py, to add to the table.",
        ),
    ] = None

    def plan(self) -> BenchPlan:
        """The plan that these options stand for.

        Raises:
            UsageError: a list is invalid.
        """
        prompts, sizes = _numbers("--prompts", self.prompts), _numbers("--sizes", self.sizes)
        return BenchPlan(prompts, sizes, min(self.questions, NUM_QUESTIONS))


@with_option_groups
def bench(
    *, ctx: typer.Context, options: BenchOptions, engine: EngineOptions, remote: ViaOptions
) -> None:
    """Measure prompt processing and generation throughput on this machine."""
    from smolcli.bench.output import check_targets, plot, print_table, read_peers, write_json
    from smolcli.bench.session import Session
    from smolcli.bench.workload import check_prompts

    log_to_stderr(is_quiet=True)
    check_targets(options.json, options.plot)
    plan, peers = options.plan(), read_peers(options.peers) if options.peers else []
    settings = engine.settings()
    servers = remote.settings(ctx, settings)
    if servers is None and ctx.obj is None:
        check_prompts(plan, settings)
    session = Session(settings, ctx.obj or backend_opener(servers), plan)
    readings = session.run(options.runs, options.compare == "transformers", _show_progress) + peers
    print_table(readings, session.identity, sys.stdout)
    if options.json:
        write_json(readings, session.identity, options.json)
    if options.plot:
        plot(readings, options.plot)


def _show_progress(line: str) -> None:
    if sys.stderr.isatty():
        typer.echo(line, err=True)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise UsageError(f"{flag} must be a comma-separated list of positive numbers: {text!r}")
    return numbers
