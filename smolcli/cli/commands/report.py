"""`smol report`: an HTML report on the results of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from smolcli.cli.options import option
from smolcli.data.jsonl import is_stream
from smolcli.data.rows import journal_path
from smolcli.errors import RunError, UsageError, error_reason

EXAMPLES = (
    "[bold]smol report queries.results.jsonl[/bold] writes queries.results.report.html. "
    "If the run had --timings, the report lists the slowest lines."
)

Results = Annotated[
    Path,
    typer.Argument(metavar="RESULTS", help="Output of smol run: JSON Lines or a table."),
]
Output = Annotated[
    Path | None,
    option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where to write the report. Default: the name of RESULTS with .report.html.",
    ),
]
Png = Annotated[
    Path | None,
    option("--png", metavar="FILE", help="Write the charts as a PNG image as well."),
]


def report(results: Results, output: Output = None, png: Png = None) -> None:
    """Turn the results of a run into an HTML report and print its path."""
    from smolcli.html_report.charts import charts_of, write_png
    from smolcli.html_report.facts import gather
    from smolcli.html_report.page import check_replaceable, render

    if output is None and is_stream(results):
        raise UsageError("a report on stdin needs --output to say where to write it")
    if not results.name:
        raise UsageError(f"{results} is a directory; pass a file of results")
    page = output or results.with_name(f"{results.stem}.report.html")
    if {page, png} & {results, journal_path(results)}:
        raise UsageError("the report would overwrite the results; choose another --output or --png")
    if page == png:
        raise UsageError("--output and --png name the same file")
    for path in filter(None, (page, png)):
        check_replaceable(path)
    facts = gather(results)
    if facts.num_skipped:
        typer.echo(f"smol: {facts.skipped_note}", err=True)
    with _writing(page):
        page.write_text(render(facts), "utf-8", "backslashreplace")
    if png is not None:
        with _writing(png):
            write_png(charts_of(facts), facts.path.name, png)
    typer.echo(os.fsencode(page))  # the name may not be UTF-8


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise RunError(f"cannot write {path}: {error_reason(exc)}") from exc
