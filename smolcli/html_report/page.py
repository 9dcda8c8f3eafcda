"""Renders the report as one self-contained HTML page."""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from smolcli.data.jsonl import is_stream
from smolcli.errors import UsageError
from smolcli.html_report.charts import GENERATOR, charts_of, svg
from smolcli.html_report.facts import Facts

_HEAD_BYTES = 4096  # of a file, within which it names its generator


def render(facts: Facts) -> str:
    """Render the page.

    Raises:
        UsageError: matplotlib is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = [(chart, Markup(svg(chart))) for chart in charts_of(facts)]
    template = environment.get_template("page.html.jinja")
    return template.render(
        facts=facts,
        generator=GENERATOR,
        tiles=_tiles(facts),
        charts=charts,
        settings=_settings(facts),
    )


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    """Headline numbers."""
    tiles = [
        ("lines", f"{facts.num_lines:,}"),
        ("answered", f"{facts.num_answered:,}"),
        ("failed", f"{facts.errors.total():,}"),
        ("prompt tokens", f"{_sum(facts.prompt_tokens):,}"),
        ("completion tokens", f"{_sum(facts.completion_tokens):,}"),
    ]
    if facts.run.get("tokens_per_second"):
        of_session = ", last session" if facts.run.get("resumed_lines") else ""
        tiles.append((f"tokens/s{of_session}", f"{facts.run['tokens_per_second']:,.1f}"))
        tiles.append((f"time{of_session}", str(timedelta(seconds=round(facts.run["seconds"])))))
    return tiles


def _sum(counts: Mapping[int, int]) -> int:
    return sum(length * count for length, count in counts.items())


def _settings(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest's settings, grouped by topic."""
    manifest = facts.manifest
    if manifest is None:
        return []
    backend = dict(manifest.backend or {})
    versions = backend.pop("versions", {})
    run = {"input": manifest.input, "input_sha256": manifest.input_sha256, "limit": manifest.limit}
    statistics = {
        name: value for name, value in facts.run.items() if name not in ("pace", "failed")
    }
    groups = {
        "Input": run,
        "Generation": {"seed": manifest.seed} | manifest.generation,
        "Model": {"requested": manifest.model} | backend,
        "Versions": versions,
        "Run": statistics,
    }
    return [(title, _shown(values)) for title, values in groups.items() if _shown(values)]


def _shown(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value))
        for name, value in values.items()
        if value is not None
    ]


def check_replaceable(path: Path) -> None:
    """Check that writing a page or picture to `path` loses nothing but an earlier one.

    Raises:
        UsageError: there is a file that `smol report` did not write.
    """
    if is_stream(path):
        return
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return  # it does not exist, or writing it fails with a better message
    if head and GENERATOR.encode() not in head:
        raise UsageError(f"{path} exists and was not written by smol report; choose another name")
