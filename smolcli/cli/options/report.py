"""What a report is made of, and where it goes."""

from pathlib import Path
from typing import Annotated

import typer

from smolcli.cli.options import option

Results = Annotated[
    Path, typer.Argument(metavar="RESULTS", help="What smol run wrote, lines of JSON or a table.")
]
Page = Annotated[
    Path | None,
    option("--output", "-o", help="The page. Default: RESULTS' name with .report.html."),
]
Picture = Annotated[Path | None, option("--png", help="Its charts as a picture, too.")]
