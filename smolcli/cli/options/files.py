"""What is asked, and where the answers go."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from smolcli.cli.options import option
from smolcli.cli.options.engine import Dedupe

_run = functools.partial(option, panel="Run")

Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="One JSON object a line, .gz too, or .csv, .tsv, .parquet; a path or a URL; "
        "- for stdin.",
    ),
]
Question = Annotated[
    str | None,
    typer.Argument(metavar="QUESTION", help="What to ask; - or nothing: read it from stdin."),
]
AsJson = Annotated[bool, option("--json", help="Print the whole result as JSON.")]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a run's answers go, and how it goes about them."""

    output: Annotated[
        str | None,
        _run(
            "--output",
            "-o",
            help="Lines of JSON, or a .csv, .tsv, .parquet table; a path, or a URL that gets a "
            "copy in the end; - for stdout. Default: INPUT's name with .results.jsonl.",
        ),
    ] = None
    errors: Annotated[
        Path | None,
        _run("--errors", help="Split failed lines off into this file when all are done."),
    ] = None
    retry_errors: Annotated[
        bool, _run("--retry-errors", help="Ask only the failed lines of a finished output again.")
    ] = False
    check: Annotated[bool, _run("--check", help="Only list the bad lines; loads no model.")] = False
    limit: Annotated[
        int | None, _run("--limit", help="Answer the first so many lines only.", least=1)
    ] = None
    overwrite: Annotated[
        bool, _run("--overwrite", help="Start anew, whatever the output holds.")
    ] = False
    extra_fields: Annotated[
        Literal["error", "ignore", "keep"],
        _run("--extra-fields", help="What to do with unknown fields; keep: under metadata."),
    ] = "error"
    dedupe: Dedupe = True
    timings: Annotated[bool, _run("--timings", help="Say what took how long.")] = False
    quiet: Annotated[bool, _run("--quiet", "-q", help="Say nothing but errors.")] = False
