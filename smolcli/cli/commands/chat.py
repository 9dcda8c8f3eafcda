"""`smol chat`: an interactive conversation in the terminal."""

from contextlib import closing

import typer

from smolcli.cli.exit_codes import ExitCode
from smolcli.cli.options import with_option_groups
from smolcli.cli.options.backend import ViaOptions, backend_opener
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.generation import GenerationOptions
from smolcli.cli.terminal import is_interactive, log_to_stderr, piped_lines, typed_lines
from smolcli.settings import smol_home

EXAMPLES = (
    '[bold]smol chat --system "You are a pirate."[/bold]\n\n'
    "[bold]smol chat --via http://127.0.0.1:8000[/bold] uses the model of a running server."
)


@with_option_groups
def chat(
    *,
    ctx: typer.Context,
    generation: GenerationOptions,
    engine: EngineOptions,
    remote: ViaOptions,
) -> None:
    """Chat with the model in the terminal. Type /help for the available commands."""
    from smolcli.cli.conversation import Conversation
    from smolcli.cli.interactive import COMMANDS, InteractiveChat

    conversation = Conversation(generation.query_defaults())
    log_to_stderr()
    open_backend = ctx.obj or backend_opener(remote.settings(ctx, engine.settings()))
    lines = piped_lines()
    if is_typed := is_interactive():
        _print_notice("loading the model")
        lines = typed_lines(list(COMMANDS), smol_home() / "chat_history", _print_notice)
    with closing(open_backend(engine.settings())) as backend:
        if is_typed:
            model = backend.identity().get("model", "ready")
            _print_notice(f"{model}; /help lists the commands, Ctrl-D quits")
        session = InteractiveChat(backend, conversation, _print_text, _print_notice, is_typed)
        session.run(lines)
    raise typer.Exit(ExitCode.SOME_FAILED if session.num_failed else ExitCode.OK)


def _print_text(text: str) -> None:
    typer.echo(text, nl=False)


def _print_notice(notice: str) -> None:
    typer.secho(notice, err=True, dim=True)
