"""`smol report`: a page that shows what came of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from smolcli.cli.options.report import Page, Picture, Results
from smolcli.data.jsonl import is_stream
from smolcli.data.rows import journal_path
from smolcli.errors import RunError, UsageError

EXAMPLES = (
    "[bold]smol report queries.results.jsonl[/bold] writes queries.results.report.html; "
    "results of [bold]smol run --timings[/bold] show the slowest lines, too."
)


def report(results: Results, output: Page = None, png: Picture = None) -> None:
    """Show what came of a run as one HTML page; print where it is."""
    from smolcli.html_report.charts import charts_of, write_png
    from smolcli.html_report.facts import gather
    from smolcli.html_report.page import render

    if output is None and is_stream(results):
        raise UsageError("where to? Give --output for a report on stdin")
    if not results.name:
        raise UsageError(f"{results} is a folder; give a file of results")
    page = output or results.with_name(f"{results.stem}.report.html")
    if {page, png} & {results, journal_path(results)}:
        raise UsageError("the page would replace the results; give another name")
    facts = gather(results)
    with _writing(page):
        page.write_text(render(facts), "utf-8")
    if png is not None:
        with _writing(png):
            write_png(charts_of(facts), facts.path.name, png)
    typer.echo(str(page))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise RunError(f"cannot write {path}: {exc.strerror or exc}") from exc
