"""`smol models`: list, inspect and remove the models in the model store."""

import json

import typer

from smolcli.cli.exit_codes import ExitCode
from smolcli.cli.options import AsJson
from smolcli.cli.options.engine import StoredModel, StoredModels

app = typer.Typer(
    no_args_is_help=True, help="List, inspect and remove the models in the model store."
)


@app.command(
    "list",
    epilog="[bold]smol models list[/bold]\n\n"
    "[bold]smol models list --json[/bold] prints names, sizes, sources and revisions as JSON.",
)
def list_models(as_json: AsJson = False) -> None:
    """List the models in the model store with size, source and revision."""
    from smolcli.weights.store import entries

    stored = list(entries())
    if as_json:
        typer.echo(json.dumps([item.summary() for item in stored], ensure_ascii=False, indent=2))
    width = max((len(item.name) for item in stored), default=0)
    for item in [] if as_json else stored:
        summary = item.summary()
        typer.echo(
            f"{item.name:{width}}  {_mb(item.num_bytes):>8}  {summary['source'] or 'damaged':8}"
            f"{str(summary['revision'] or '')[:12]}".rstrip()
        )
    if not stored:
        typer.echo("the model store is empty; smol pull downloads a model", err=True)


@app.command(epilog="[bold]smol models show HuggingFaceTB/SmolLM2-135M-Instruct[/bold]")
def show(model: StoredModel) -> None:
    """Show where a model came from and verify its checksums."""
    from smolcli.weights.store import file_sizes, find_damage, find_entry, read_record

    item = find_entry(model)
    damage = find_damage(item.folder)
    recorded = {k: v for k, v in read_record(item.folder).items() if k != "sha256"}
    shown = {"folder": str(item.folder), **recorded, "files": file_sizes(item.folder)}
    typer.echo(json.dumps(shown | {"fault": damage}, ensure_ascii=False, indent=2))
    raise typer.Exit(ExitCode.FAILED if damage else ExitCode.OK)


@app.command("rm", epilog="[bold]smol models rm HuggingFaceTB/SmolLM2-135M-Instruct[/bold]")
def remove_models(models: StoredModels) -> None:
    """Remove models from the model store."""
    from smolcli.weights.store import find_entry, remove

    for item in [find_entry(model) for model in models]:
        remove(item)
        typer.echo(f"removed {item.name} ({_mb(item.num_bytes)})", err=True)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
