"""`smol chat`: a conversation in the terminal."""

from contextlib import closing

import typer

from smolcli.cli.commands import SOME_FAILED, backend_opener, log_to_stderr
from smolcli.cli.options import grouped
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.generation import GenerationOptions
from smolcli.cli.options.remote import ViaOptions
from smolcli.settings import smol_home

EXAMPLES = (
    '[bold]smol chat --system "You are a pirate."[/bold] sets the tone.\n\n'
    "[bold]smol chat --via http://127.0.0.1:8000[/bold] talks with the model of a server."
)


@grouped
def chat(
    *,
    ctx: typer.Context,
    generation: GenerationOptions,
    engine: EngineOptions,
    remote: ViaOptions,
) -> None:
    """InteractiveChat with the model; /help tells what else can be typed."""
    from smolcli.cli.conversation import Conversation
    from smolcli.cli.interactive import COMMANDS, InteractiveChat
    from smolcli.cli.terminal import is_interactive, piped_lines, typed_lines

    conversation = Conversation(generation.query_defaults())
    log_to_stderr()
    open_backend = backend_opener(remote.settings(engine.settings()))
    lines = piped_lines()
    if is_typed := is_interactive():
        _say("one moment")
        lines = typed_lines(list(COMMANDS), smol_home() / "chat_history", _say)
    with closing((ctx.obj or open_backend)(engine.settings())) as backend:
        if is_typed:
            _say(f"{backend.identity().get('model', 'ready')}; /help helps, Ctrl-D ends")
        talk = InteractiveChat(backend, conversation, _show, _say, is_typed)
        talk.run(lines)
    raise typer.Exit(SOME_FAILED if talk.num_failed else 0)


def _show(text: str) -> None:
    typer.echo(text, nl=False)


def _say(remark: str) -> None:
    typer.secho(remark, err=True, dim=True)
