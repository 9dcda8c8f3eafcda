"""`smol bench`: how fast it is here."""

import sys

import typer

from smolcli.cli.commands import backend_opener, log_to_stderr
from smolcli.cli.options import grouped
from smolcli.cli.options.bench import BenchOptions
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.remote import ViaOptions

EXAMPLES = (
    "[bold]smol bench --compare transformers[/bold] takes a few minutes.\n\n"
    "[bold]smol bench --sizes 1,2,4,8,16,32,64,128 --max-batch-size 128 --plot speed.svg[/bold] "
    "shows what batching gains."
)


@grouped
def bench(
    *, ctx: typer.Context, engine: EngineOptions, remote: ViaOptions, options: BenchOptions
) -> None:
    """Time prompts, batches and real questions on this machine, against others if wanted."""
    from smolcli.bench.session import Session
    from smolcli.bench.show import plot, print_table, read_peers, write_json

    log_to_stderr(is_quiet=True)
    plan, peers = options.plan(), read_peers(options.peers) if options.peers else []
    settings = engine.settings()
    session = Session(settings, ctx.obj or backend_opener(remote.settings(settings)), plan)
    readings = session.run(options.runs, options.compare == "transformers", _say) + peers
    print_table(readings, session.identity, sys.stdout)
    if options.json:
        write_json(readings, session.identity, options.json)
    if options.plot:
        plot(readings, options.plot)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        typer.echo(text, err=True)
