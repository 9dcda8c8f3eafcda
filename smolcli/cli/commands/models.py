"""`smol models`: list, inspect and remove the models in the model store."""

import json
from typing import Any

import typer
from typer.core import TyperGroup

from smolcli.cli.argument_conversion import SmolCommand
from smolcli.cli.exit_codes import ExitCode
from smolcli.cli.help_layout import ReadableHelp
from smolcli.cli.options import AsJson
from smolcli.cli.options.engine import StoredModel, StoredModels


class ModelsGroup(ReadableHelp, TyperGroup):
    """The commands of `smol models`."""


app = typer.Typer(
    cls=ModelsGroup,
    add_completion=False,
    no_args_is_help=True,
    help="List, inspect and remove the models in the model store.",
    epilog="[bold]smol models list[/bold]\n\n"
    "[bold]smol models show HuggingFaceTB/SmolLM2-135M-Instruct[/bold] verifies a model.",
)


@app.command(
    "list",
    cls=SmolCommand,
    epilog="[bold]smol models list[/bold]\n\n"
    "[bold]smol models list --json[/bold] prints names, sizes, sources and revisions as JSON.",
)
def list_models(as_json: AsJson = False) -> None:
    """List the models in the model store: size, source, revision and number format."""
    from smolcli.weights.packed import packed_files
    from smolcli.weights.store import entries

    stored = [item.summary() for item in entries()]
    packed = [
        {"source": "packed", "format": file.kernels, "revision": None} | file.summary()
        for file in packed_files()
    ]
    listed: list[dict[str, Any]] = [*stored, *packed]
    if as_json:
        typer.echo(json.dumps(listed, ensure_ascii=False, indent=2))
    width = max((len(item["name"]) for item in listed), default=0)
    for item in [] if as_json else listed:
        typer.echo(
            f"{item['name']:{width}}  {_mb(item['bytes']):>8}  {item['source'] or 'damaged':8}"
            f"{str(item['revision'] or '')[:12]:12}  {item['format'] or ''}".rstrip()
        )
    if not listed:
        typer.echo(
            "the model store is empty; models from the Hub are in the Hugging Face cache", err=True
        )


@app.command(
    cls=SmolCommand, epilog="[bold]smol models show HuggingFaceTB/SmolLM2-135M-Instruct[/bold]"
)
def show(model: StoredModel) -> None:
    """Show where a model came from and verify its checksums."""
    from smolcli.weights.packed import packed_files
    from smolcli.weights.store import file_sizes, find_damage, find_entry, read_record

    item = find_entry(model)
    damage = find_damage(item.folder)
    recorded = {k: v for k, v in read_record(item.folder).items() if k != "sha256"}
    shown = {"folder": str(item.folder), **recorded, "files": file_sizes(item.folder)}
    shown["format"] = item.summary()["format"]
    shown["packed"] = {
        file.kernels: file.num_bytes for file in packed_files() if file.model == item.name
    }
    typer.echo(json.dumps(shown | {"damage": damage}, ensure_ascii=False, indent=2))
    raise typer.Exit(ExitCode.FAILED if damage else ExitCode.OK)


@app.command(
    "rm",
    cls=SmolCommand,
    epilog="[bold]smol models rm HuggingFaceTB/SmolLM2-135M-Instruct[/bold]",
)
def remove_models(models: StoredModels) -> None:
    """Remove models and their packed weights from the model store."""
    from smolcli.text.vocabulary_index import remove_index
    from smolcli.weights.packed import packed_files, remove_packed
    from smolcli.weights.store import entries, find_entry, remove

    names = {item.name for item in entries()}
    packed = list(packed_files())
    only_packed = {file.model for file in packed} - names
    items = [find_entry(model) for model in models if model not in only_packed]
    for item in items:
        remove_index(item.folder)
        remove(item)
        typer.echo(f"removed {item.name} ({_mb(item.num_bytes)})", err=True)
    names = {item.name for item in items} | set(models)
    for file in [file for file in packed if file.model in names]:
        remove_packed(file)
        typer.echo(f"removed packed weights of {file.model} ({_mb(file.num_bytes)})", err=True)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
