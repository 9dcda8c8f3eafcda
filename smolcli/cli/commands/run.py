"""`smol run`: a file of questions."""

from pathlib import Path

import typer

from smolcli.cli.commands import SOME_FAILED, backend_opener, log_to_stderr
from smolcli.cli.options import grouped
from smolcli.cli.options.engine import ClusterOptions, EngineOptions
from smolcli.cli.options.files import Input, RunOptions
from smolcli.cli.options.generation import GenerationOptions
from smolcli.cli.options.remote import ViaOptions
from smolcli.cli.options.schema import Schema, read_format
from smolcli.cli.options.tables import TableOptions
from smolcli.data.remote_files import fetched, here, is_elsewhere, put, refuse_foreign
from smolcli.data.rows import format_of, journal_path
from smolcli.settings import RunSettings
from smolcli.types import Result

EXAMPLES = (
    "[bold]smol run queries.jsonl[/bold] writes queries.results.jsonl; "
    "run again, it goes on where it was cut short.\n\n"
    "[bold]smol run reviews.csv --prompt 'Summarize: {review}' -o out.csv[/bold] asks "
    "of each row of a table.\n\n"
    "[bold]zcat queries.jsonl.gz | smol run - > results.jsonl[/bold] reads and writes pipes."
)


@grouped
def run(
    *,
    ctx: typer.Context,
    input: Input,
    schema: Schema = None,
    generation: GenerationOptions,
    engine: EngineOptions,
    cluster: ClusterOptions,
    remote: ViaOptions,
    tables: TableOptions,
    options: RunOptions,
) -> None:
    """Answer a file of questions, or each row of a table: one result for each, in order."""
    from smolcli.backends.dedup import deduplicated
    from smolcli.batch.progress import open_progress
    from smolcli.batch.runner import default_output, run_file

    target = options.output or str(default_output(here(input)))
    output = here(target)
    if is_elsewhere(target) and not (options.overwrite or options.check):
        refuse_foreign(target, output)
    source = ctx.with_resource(fetched(input))
    settings = _settings(source, output, schema, generation, engine, tables, options)
    log_to_stderr(options.quiet)
    if options.check:
        return _check(settings, options.quiet)
    display = open_progress(options.quiet)
    open_backend = ctx.obj or backend_opener(remote.settings(settings.engine), cluster)
    report = run_file(
        settings, deduplicated(open_backend) if options.dedupe else open_backend, display
    )
    display.summary(report, output)
    if is_elsewhere(target):
        put(output, target)
        display.note(f"copied to {target}")
    raise typer.Exit(SOME_FAILED if report.failed else 0)


def _settings(
    source: Path,
    output: Path,
    schema: str | None,
    generation: GenerationOptions,
    engine: EngineOptions,
    tables: TableOptions,
    options: RunOptions,
) -> RunSettings:
    return RunSettings(
        input=source,
        output=journal_path(output),
        defaults=generation.query_defaults(options.extra_fields, read_format(schema)),
        engine=engine.settings(),
        seed=generation.seed,
        limit=options.limit,
        errors=options.errors,
        retry_errors=options.retry_errors,
        overwrite=options.overwrite,
        with_timings=options.timings,
        rows=tables.settings(),
        table=output if format_of(output) else None,
    )


def _check(settings: RunSettings, is_quiet: bool) -> None:
    from smolcli.batch.validation import check_input, folder_on_disk, prompt_fits

    folder = folder_on_disk(settings.engine.model)
    num_lines = num_bad = 0
    for item in check_input(settings, prompt_fits(folder) if folder else None):
        num_lines += 1
        if isinstance(item, Result):
            num_bad += 1
            typer.echo(f"line {item.line}: {item.error_code}: {item.error}")
    if not is_quiet:
        lengths = "" if folder else "; prompt lengths unchecked: the model is not on this disk"
        typer.echo(f"{num_lines:,} lines, {num_bad:,} bad{lengths}", err=True)
    raise typer.Exit(SOME_FAILED if num_bad else 0)
