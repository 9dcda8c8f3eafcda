"""The `smol` command: registers the commands and turns errors into exit codes."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper, UnsupportedOperation
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smolcli import __version__
from smolcli.cli.argument_conversion import SmolCommand, convert_plain_values
from smolcli.cli.config_file import find_config, load_config
from smolcli.cli.exit_codes import ExitCode
from smolcli.cli.help_layout import ReadableHelp
from smolcli.cli.option_sources import add_sources
from smolcli.cli.terminal import replace_closed_streams
from smolcli.errors import SmolError, UsageError, error_reason

GC_THRESHOLD = 100_000  # by default, looking for garbage takes a tenth of the start-up time
ANSWERING, MAINTAINING = "Answer questions", "Models and machine"
COMMANDS = {  # the panel of the help that lists each command; `smol run` is commands.run.run
    "run": ANSWERING,
    "ask": ANSWERING,
    "chat": ANSWERING,
    "serve": ANSWERING,
    "report": ANSWERING,
    "pull": MAINTAINING,
    "doctor": MAINTAINING,
    "bench": MAINTAINING,
    "models": MAINTAINING,
}


class Commands(Mapping[str, Any]):
    """The commands by name, each of which is imported when it is first looked up."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _load_command(name, COMMANDS[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _load_command(name: str, panel: str) -> Any:
    """Import a command, or a group of commands: a module that has an `app` of its own."""
    module = import_module(f"smolcli.cli.commands.{name}")
    if hasattr(module, "app"):
        group = typer.main.get_command(module.app)
        group.name, group.rich_help_panel = name, panel  # type: ignore[attr-defined]
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    register = alone.command(
        name,
        cls=getattr(module, "COMMAND_CLASS", SmolCommand),
        epilog=module.EXAMPLES,
        rich_help_panel=panel,
    )
    register(getattr(module, name))
    return typer.main.get_command(alone)


class SmolGroup(ReadableHelp, TyperGroup):
    """Imports only the command that runs, and turns expected errors into exit codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = Commands()  # type: ignore[assignment]  # nothing adds commands to it

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, which convert plain values without pydantic."""
        return convert_plain_values(super().get_params(ctx))

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the options of the group, whose help imports every command."""
        try:
            return super().make_context(*args, **options)
        except KeyboardInterrupt as exc:
            raise _interrupted() from exc

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SmolError as exc:
            add_sources(exc, ctx)  # for SMOL_CONFIG
            typer.echo(f"smol: {exc}", err=True)
            is_usage = isinstance(exc, UsageError)
            raise typer.Exit(ExitCode.USAGE if is_usage else ExitCode.FAILED) from exc
        except KeyboardInterrupt as exc:
            raise _interrupted() from exc
        except OSError as exc:
            if isinstance(exc, FileNotFoundError) and exc.filename is None:  # from os.getcwd
                typer.echo("smol: the current directory no longer exists", err=True)
                raise typer.Exit(ExitCode.FAILED) from exc
            if not _concerns_stdout(exc) or isinstance(exc, BrokenPipeError):
                raise  # a broken pipe ends the process silently: the reader is gone
            _report_stdout(exc)
            raise typer.Exit(ExitCode.FAILED) from exc

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command; output outside of `invoke`, such as help, may fail as well."""
        gc.set_threshold(GC_THRESHOLD)
        atexit.register(gc.freeze)  # else Python searches everything for garbage as it exits
        try:
            try:
                return super().main(*args, **options)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except BrokenPipeError:
            _discard_stdout()
            sys.exit(ExitCode.FAILED)
        except OSError as exc:
            if not _concerns_stdout(exc):
                raise
            _report_stdout(exc)
            sys.exit(ExitCode.FAILED)


app = typer.Typer(
    cls=SmolGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run SmolLM2 on your own machine: batches, single questions, a server.",
    epilog='[bold]smol ask "What is gravity?"[/bold] answers one question.\n\n'
    "[bold]smol run queries.jsonl[/bold] answers every question in a file.",
)


def _interrupted() -> typer.Exit:
    typer.echo("smol: interrupted", err=True)
    return typer.Exit(ExitCode.INTERRUPTED)


def _concerns_stdout(exc: OSError) -> bool:
    """Whether writing to stdout failed: errors about files have a file name."""
    has_reason = exc.errno is not None or isinstance(exc, UnsupportedOperation)
    return exc.filename is None and has_reason


def _report_stdout(exc: OSError) -> None:
    typer.echo(f"smol: cannot write to stdout: {error_reason(exc)}", err=True)
    _discard_stdout()


def _discard_stdout() -> None:
    """Discard buffered output, which Python would try to write again on exit."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def _print_version(is_requested: bool) -> None:
    if is_requested:
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
            help="TOML file with default values for options. Default: config.toml in the user's "
            "configuration directory, if it exists.",
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    replace_closed_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        # stdout is data, whatever the console's encoding; file names may be any bytes
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    if path := find_config(config):
        ctx.default_map = load_config(path, ctx)
        ctx.meta["config"] = path
