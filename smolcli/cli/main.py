"""The `smol` command: its commands, and the one place where an error becomes an exit code."""

import functools
import os
import sys
from io import TextIOWrapper, UnsupportedOperation
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smolcli import __version__
from smolcli.cli.commands import (
    FAILED,
    INTERRUPTED,
    USAGE,
    ask,
    bench,
    chat,
    doctor,
    models,
    pull,
    report,
    run,
    serve,
)
from smolcli.cli.options.config import config_file, load_config
from smolcli.errors import SmolError, UsageError


class SmolGroup(TyperGroup):
    """Makes every error of ours a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SmolError as exc:
            typer.echo(f"smol: {exc}", err=True)
            raise typer.Exit(USAGE if isinstance(exc, UsageError) else FAILED) from exc
        except KeyboardInterrupt as exc:
            typer.echo("smol: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from exc
        except OSError as exc:
            if not _is_of_stdout(exc) or isinstance(exc, BrokenPipeError):
                raise  # that one ends the process without a word: whoever read has left
            typer.echo(f"smol: cannot write stdout: {exc.strerror or exc}", err=True)
            raise typer.Exit(FAILED) from exc


app = typer.Typer(
    cls=SmolGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Answer questions with SmolLM2 on this machine.",
    epilog='[bold]smol ask "What is gravity?"[/bold] answers one question, '
    "[bold]smol run queries.jsonl[/bold] a file of them.",
)


def _is_of_stdout(exc: OSError) -> bool:
    """Whether stdout cannot be written: errors of files name them, others have no number."""
    has_reason = exc.errno is not None or isinstance(exc, UnsupportedOperation)
    return exc.filename is None and has_reason


def _open_standard_streams() -> None:
    """Stand in for those that are closed: none is None, and no file that is opened becomes one."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull)  # noqa: SIM115  cannot be written: data matters
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"smol {__version__}")
        raise typer.Exit


@app.callback()
def main(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            envvar="SMOL_CONFIG",
            help="A TOML file of defaults for the options of all commands; "
            "config.toml in the user's own folder of settings is one anyway.",
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    _open_standard_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the console has: stdout is data
    if path := config_file(config):
        ctx.default_map = load_config(path, ctx)
        ctx.meta["config"] = path


_answering = functools.partial(app.command, rich_help_panel="QueryReader")
_answering(epilog=run.EXAMPLES)(run.run)
_answering(epilog=ask.EXAMPLES)(ask.ask)
_answering(epilog=chat.EXAMPLES)(chat.chat)
_answering(epilog=report.EXAMPLES)(report.report)
_answering(epilog=serve.EXAMPLES)(serve.serve)
_keeping = functools.partial(app.command, rich_help_panel="Models and this machine")
_keeping(epilog=pull.EXAMPLES)(pull.pull)
app.add_typer(models.app, name="models", rich_help_panel="Models and this machine")
_keeping(epilog=doctor.EXAMPLES)(doctor.doctor)
_keeping(epilog=bench.EXAMPLES)(bench.bench)
