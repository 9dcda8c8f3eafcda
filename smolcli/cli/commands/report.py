"""`smol report`: an HTML report on the results of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from smolcli.cli.options import option
from smolcli.data.jsonl import is_stream
from smolcli.errors import UsageError, cannot_write

EXAMPLES = (
    "[bold]smol report queries.results.jsonl[/bold] writes queries.results.report.html. "
    "If the run had --timings, the report lists the slowest lines."
)

_STDOUT = Path("-")

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
        help="Where to write the report; - for stdout. Default: the name of RESULTS with the "
        "extension .report.html.",
        variable="SMOL_REPORT_OUTPUT",
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
    from smolcli.html_report.page import render

    if output is None and is_stream(results):
        raise UsageError("a report on stdin needs --output to say where to write it")
    if not results.name:
        raise UsageError(f"{results} is a directory; pass a file of results")
    page = output or results.with_name(f"{results.stem}.report.html")
    _check_targets(results, page, png)
    facts = gather(results)
    if facts.num_skipped:
        typer.echo(f"smol: {facts.skipped_note}", err=True)
    html = render(facts)
    if page != _STDOUT:
        with _writing(page):
            page.write_text(html, "utf-8", "backslashreplace")
    if png is not None:
        with _writing(png):
            write_png(charts_of(facts), facts.path.name, png)
    if page == _STDOUT:
        typer.echo(html.encode("utf-8", "backslashreplace"), nl=False)
    else:
        typer.echo(os.fsencode(page))  # the name may not be UTF-8


def _check_targets(results: Path, page: Path, png: Path | None) -> None:
    """Reject targets that would replace a file that is not a report."""
    from smolcli.data.table_writer import journal_path
    from smolcli.html_report.page import check_replaceable

    if png == _STDOUT:
        raise UsageError("--png needs a file, not stdout")
    if ({page, png} & {results, journal_path(results)}) - {_STDOUT}:
        raise UsageError("the report would overwrite the results; choose another --output or --png")
    if page == png:
        raise UsageError("--output and --png name the same file")
    for path in filter(None, (page, png)):
        if path != _STDOUT:
            check_replaceable(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise cannot_write(path, exc) from exc
