"""`smol models`: what the model store holds."""

import json

import typer

from smolcli.cli.commands import FAILED
from smolcli.cli.options.engine import StoredModel, StoredModels
from smolcli.cli.options.files import AsJson

app = typer.Typer(no_args_is_help=True, help="List, show and remove the models of the store.")


@app.command(
    "list", epilog="[bold]smol models list --json[/bold] gives names, sizes, sources, revisions."
)
def list_models(as_json: AsJson = False) -> None:
    """List the models of the store."""
    from smolcli.weights.store import entries

    held = list(entries())
    if as_json:
        typer.echo(json.dumps([item.summary() for item in held], ensure_ascii=False, indent=2))
    width = max((len(item.name) for item in held), default=0)
    for item in [] if as_json else held:
        facts = item.summary()
        typer.echo(
            f"{item.name:{width}}  {_mb(item.num_bytes):>8}  {facts['source'] or 'damaged':8}"
            f"{str(facts['revision'] or '')[:12]}".rstrip()
        )
    if not held:
        typer.echo("the store is empty; smol pull puts a model there", err=True)


@app.command(
    epilog="[bold]smol models show HuggingFaceTB/SmolLM2-135M-Instruct[/bold] checks it, too."
)
def show(model: StoredModel) -> None:
    """Show where a model came from, what it was made with, and whether it is whole."""
    from smolcli.weights.store import file_sizes, find_damage, find_entry, read_record

    item = find_entry(model)
    wrong = find_damage(item.folder)
    written = {k: v for k, v in read_record(item.folder).items() if k != "sha256"}
    shown = {"folder": str(item.folder), **written, "files": file_sizes(item.folder)}
    typer.echo(json.dumps(shown | {"fault": wrong}, ensure_ascii=False, indent=2))
    raise typer.Exit(FAILED if wrong else 0)


@app.command("rm", epilog="[bold]smol models rm HuggingFaceTB/SmolLM2-135M-Instruct[/bold]")
def remove_models(models: StoredModels) -> None:
    """Remove models from the store."""
    from smolcli.weights.store import find_entry, remove

    for item in [find_entry(model) for model in models]:
        remove(item)
        typer.echo(f"removed {item.name}, {_mb(item.num_bytes)}", err=True)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
