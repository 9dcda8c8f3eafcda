"""`smol run`: answer a file of queries."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from smolcli.cli.exit_codes import ExitCode
from smolcli.cli.options import option, with_option_groups
from smolcli.cli.options.backend import ClusterOptions, ViaOptions, backend_opener
from smolcli.cli.options.engine import Dedupe, EngineOptions
from smolcli.cli.options.generation import GenerationOptions, Schema, read_schema
from smolcli.cli.options.tables import TableOptions
from smolcli.cli.terminal import log_to_stderr
from smolcli.data.detection import table_kind
from smolcli.data.remote_files import (
    downloaded,
    is_remote,
    local_path,
    reject_overwrite,
    upload,
)
from smolcli.errors import UsageError, counted, without_credentials
from smolcli.settings import RESULTS_TABLE, InputFile, RunSettings
from smolcli.types import Result

EXAMPLES = (
    "[bold]smol run queries.jsonl[/bold] writes queries.results.jsonl. "
    "Run it again to resume after an interruption.\n\n"
    "[bold]smol run reviews.csv --prompt 'Summarize: {review}' -o summaries.csv[/bold] "
    "answers a prompt for every row of a table.\n\n"
    "[bold]smol run a.jsonl b.csv 'data/*.jsonl' -o all.jsonl[/bold] answers several files and "
    "writes one output.\n\n"
    "[bold]smol run shop.db --query 'SELECT id, review FROM reviews ORDER BY id' --id-column id "
    "--prompt 'Summarize: {review}' -o shop.db --output-table summaries[/bold] reads and writes "
    "an SQLite database.\n\n"
    "[bold]smol run queries.jsonl --check[/bold] lists invalid lines without loading a model.\n\n"
    "[bold]cat queries.jsonl | smol run - > results.jsonl[/bold] works in a pipeline."
)

# Paths of standard streams, which may be redirected to files.
STDIN_NAMES = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
STDOUT_NAMES = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")

InputNames = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Queries in JSON Lines, prompts in a .txt file, a .csv, .tsv, .parquet or .arrow "
        "table, or an SQLite database; text files may be compressed. A path, a URL, or - for "
        "stdin. Several files, directories and patterns such as 'data/*.jsonl' share one output.",
    ),
]
_run = functools.partial(option, panel="Input and output")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where results go, and which lines to answer."""

    output: Annotated[
        str | None,
        _run(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write results: JSON Lines (compressed if it ends in .gz, .zst, .bz2 or "
            ".xz), a .csv, .tsv, .parquet or .arrow table, or an SQLite database (.db, .sqlite). A "
            "path, a URL, or - for stdout. Default: the name of INPUT with the extension "
            ".results.jsonl, or stdout if INPUT is stdin.",
        ),
    ] = None
    output_table: Annotated[
        str,
        _run(
            "--output-table",
            metavar="NAME",
            help="Table for the results if --output is an SQLite database.",
        ),
    ] = RESULTS_TABLE
    errors: Annotated[
        Path | None,
        _run(
            "--errors",
            metavar="FILE",
            help="Move failed lines to this file when the run is complete.",
        ),
    ] = None
    retry_errors: Annotated[
        bool,
        _run(
            "--retry-errors",
            help="Retry the failed lines of a complete output, and those that changed in INPUT.",
        ),
    ] = False
    check: Annotated[
        bool,
        _run("--check", help="Validate the input and list invalid lines without loading a model."),
    ] = False
    limit: Annotated[
        int | None,
        _run("--limit", metavar="N", help="Answer only the first N lines.", min=1, max=sys.maxsize),
    ] = None
    overwrite: Annotated[
        bool,
        _run("--overwrite", help="Replace an existing output instead of resuming it."),
    ] = False
    extra_fields: Annotated[
        Literal["error", "ignore", "keep"],
        _run(
            "--extra-fields",
            metavar="ACTION",
            help="What to do with unknown fields of a query. keep: copy them to the result's "
            "metadata.",
        ),
    ] = "error"
    timings: Annotated[bool, _run("--timings", help="Add per-line timings to the results.")] = False
    quiet: Annotated[bool, _run("--quiet", "-q", help="Print errors only.")] = False


@with_option_groups
def run(
    *,
    ctx: typer.Context,
    inputs: InputNames,
    options: RunOptions,
    tables: TableOptions,
    generation: GenerationOptions,
    schema: Schema = None,
    engine: EngineOptions,
    dedupe: Dedupe = True,
    remote: ViaOptions,
    cluster: ClusterOptions,
) -> None:
    """Answer every query of a file, or a prompt for every row of a table.

    Results are written in input order. Running the same command again resumes an interrupted run.
    """
    from smolcli.backends.dedup import deduplicated
    from smolcli.batch.progress import open_progress
    from smolcli.batch.runner import run_file
    from smolcli.data.inputs import are_several

    if "" in (*inputs, options.output, options.output_table):
        raise UsageError(
            "the name of an input, of --output or of --output-table is empty; check shell variables"
        )
    if len(inputs) == 1 and inputs[0] in STDIN_NAMES:
        inputs = ["-"]
    target = _target(inputs, options)
    output = local_path(target)
    if is_remote(target) and not (options.overwrite or options.check):
        reject_overwrite(target, output)
    if is_several := are_several(inputs):
        inputs = _files(inputs, output, options)
    sources = tuple(InputFile(_shown(name), ctx.with_resource(downloaded(name))) for name in inputs)
    settings = _settings(sources, is_several, output, schema, generation, engine, tables, options)
    log_to_stderr(options.quiet)
    if options.check:
        return _check(settings, options.quiet)
    progress = open_progress(options.quiet)
    servers = remote.settings(ctx, settings.engine)
    if servers is not None and tables.truncate_prompt:
        raise UsageError(
            "--truncate-prompt counts tokens with the tokenizer of a model on this machine; it "
            "cannot be combined with --via"
        )
    open_backend = ctx.obj or backend_opener(servers, cluster.settings())
    statistics = run_file(
        settings, deduplicated(open_backend) if dedupe else open_backend, progress
    )
    progress.summary(statistics, output)
    if is_remote(target):
        upload(output, target)
        progress.note(f"copied to {_shown(target)}")
    raise typer.Exit(ExitCode.SOME_FAILED if statistics.failed else ExitCode.OK)


def _target(inputs: list[str], options: RunOptions) -> str:
    """Where the results go: a path, a URL or `-`."""
    from smolcli.batch.runner import default_output
    from smolcli.data.inputs import are_several

    if options.output is not None:
        return "-" if options.output in STDOUT_NAMES else options.output
    if are_several(inputs):
        if options.check:
            return "-"
        raise UsageError("several inputs need --output FILE, or - for stdout")
    return str(default_output(local_path(inputs[0])))


def _files(inputs: list[str], output: Path, options: RunOptions) -> list[str]:
    """The names of all input files.

    Raises:
        UsageError: one of them is stdin, or a pattern matches nothing.
    """
    from smolcli.batch.manifest import manifest_path
    from smolcli.data.inputs import expanded
    from smolcli.data.table_writer import journal_path

    if "-" in inputs:
        raise UsageError("stdin cannot be combined with other inputs")
    journal = journal_path(output, options.output_table)
    written = [output, journal, manifest_path(journal), options.errors]
    return expanded(inputs, filter(None, written))


def _shown(name: str) -> str:
    """The name of an input for messages and results, without the password in a URL.

    File names may be any bytes.
    """
    text = name.encode(errors="backslashreplace").decode()
    return without_credentials(text) if "://" in text else text


def _settings(
    sources: tuple[InputFile, ...],
    is_several: bool,
    output: Path,
    schema: str | None,
    generation: GenerationOptions,
    engine: EngineOptions,
    tables: TableOptions,
    options: RunOptions,
) -> RunSettings:
    from smolcli.data.table_writer import journal_path

    return RunSettings(
        input=sources[0].path,
        output=journal_path(output, options.output_table),
        defaults=generation.query_defaults(options.extra_fields, read_schema(schema)),
        engine=engine.settings(),
        seed=generation.given_seed,
        limit=options.limit,
        errors=options.errors,
        retry_errors=options.retry_errors,
        overwrite=options.overwrite,
        with_timings=options.timings,
        rows=tables.settings(),
        table=output if table_kind(output) else None,
        files=sources if is_several else (),
        input_name=sources[0].name,
        table_name=options.output_table,
    )


def _check(settings: RunSettings, is_quiet: bool) -> None:
    from smolcli.batch.validation import check_input, folder_on_disk, prompt_fits
    from smolcli.data.inputs import Inputs

    folder, inputs = folder_on_disk(settings.engine.model), Inputs.of(settings)
    num_lines = num_invalid = 0
    check = prompt_fits(folder, settings.engine.chat_template) if folder else None
    for item in check_input(settings, check):
        num_lines += 1
        if isinstance(item, Result):
            num_invalid += 1
            typer.echo(f"{inputs.where(item.line or 0)}: {item.error_code}: {item.error}")
    if not is_quiet:
        note = "" if folder else "; prompt lengths not checked: the model is not downloaded"
        typer.echo(f"{counted(num_lines, 'line')}, {num_invalid:,} invalid{note}", err=True)
    raise typer.Exit(ExitCode.SOME_FAILED if num_invalid else ExitCode.OK)
