"""The charts of a report, drawn with matplotlib: SVG for the page, or all in one PNG."""

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolcli.errors import UsageError
from smolcli.html_report.facts import Facts, quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, ACCENT, BAD = "#16191c", "#566068", "#d5dadd", "#0f766e", "#b3261e"
CSS_VARIABLES = {INK: "ink", FAINT: "faint", GRID: "line", ACCENT: "accent", BAD: "bad"}
GENERATOR = "smol report"  # marks the files that a report may replace
NUM_BINS = 24
CHART_INCHES = (4.6, 2.3)

_STYLE: Any = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "text.parse_math": False,
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "smol",  # deterministic ids
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart: its title, a summary in words, and a function that draws it."""

    title: str
    summary: str
    draw: Callable[["Axes"], None]


def charts_of(facts: Facts) -> list[Chart]:
    """The charts that the data allows."""
    charts = [_outcomes(facts)] if facts.num_lines else []
    for title, counts in (("prompts", facts.prompt_tokens), ("answers", facts.completion_tokens)):
        if counts:
            charts.append(_lengths(title, counts))
    if facts.run.get("pace"):
        charts.append(_throughput(facts.run))
    if facts.latencies_s:
        charts.append(_latencies(facts.latencies_s))
    return charts


def svg(chart: Chart) -> str:
    """Draw a chart as SVG that takes its colors from the page's CSS variables.

    Raises:
        UsageError: matplotlib is not installed.
    """
    text = io.StringIO()
    with _new_figure(CHART_INCHES) as figure:
        chart.draw(figure.subplots())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r' id="[\w.]+_\d+"', "", drawing)  # ids that several charts share
    for color, name in CSS_VARIABLES.items():
        drawing = drawing.replace(color, f"var(--{name})")
    return drawing


def write_png(charts: Sequence[Chart], title: str, path: Path) -> None:
    """Draw all charts into one PNG file.

    Args:
        charts: the charts.
        title: shown above them.
        path: the file to write.

    Raises:
        UsageError: matplotlib is not installed.
    """
    num_rows = max(1, math.ceil(len(charts) / 2))
    width, height = CHART_INCHES
    with _new_figure((2 * width, num_rows * (height + 0.6) + 0.4)) as figure:
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        for at, chart in enumerate(charts, start=1):
            axes = figure.add_subplot(num_rows, 2, at)
            chart.draw(axes)
            axes.set_title(f"{chart.title}\n{chart.summary}")
        figure.savefig(path, format="png", dpi=150, metadata={"Software": GENERATOR})


@contextmanager
def _new_figure(inches: tuple[float, float]) -> "Iterator[Figure]":
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise UsageError("smol report needs matplotlib: pip install 'smolcli[report]'") from exc
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=inches, layout="constrained")


def _outcomes(facts: Facts) -> Chart:
    answers, errors = facts.finish_reasons.most_common(), facts.errors.most_common()
    names = [name for name, _ in answers + errors]
    counts = [count for _, count in answers + errors]

    def draw(axes: "Axes") -> None:
        colors = [ACCENT] * len(answers) + [BAD] * len(errors)
        bars = axes.barh(names, counts, color=colors, height=min(0.7, 0.2 * len(names)))
        axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.3 / len(names))
        axes.grid(False)
        axes.spines.bottom.set_visible(False)
        axes.set_xticks([])

    summary = f"{facts.num_answered:,} answered, {facts.errors.total():,} failed"
    return Chart("Outcomes", summary, draw)


def _lengths(title: str, counts: Counter[int]) -> Chart:
    low, high = min(counts), max(counts)
    step = math.ceil((high - low + 1) / NUM_BINS)

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        _draw_histogram(axes, counts, list(range(low, high + step + 1, step)))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel("tokens")

    return Chart(f"Length of {title}", f"{_quantiles(counts)} tokens", draw)


def _latencies(counts: Counter[float]) -> Chart:
    low, high = min(counts), max(counts)
    step = (high - low) / NUM_BINS or 1.0

    def draw(axes: "Axes") -> None:
        _draw_histogram(axes, counts, [low + step * at for at in range(NUM_BINS + 1)])
        axes.set_xlabel("seconds from submission to the last token")

    return Chart("Latency", f"{_quantiles(counts)} s", draw)


def _draw_histogram(axes: "Axes", counts: Counter[Any], edges: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.hist(list(counts), bins=edges, weights=list(counts.values()), color=ACCENT, rwidth=0.9)
    axes.set_ylabel("lines")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _throughput(run: Mapping[str, Any]) -> Chart:
    edges_s, rates = _rates(run["pace"]["interval_s"], run["pace"]["tokens"], run["seconds"])
    unit, unit_s = _unit(run["seconds"])

    def draw(axes: "Axes") -> None:
        axes.stairs(rates, [edge / unit_s for edge in edges_s], fill=True, color=ACCENT)
        axes.axhline(run["tokens_per_second"], color=INK, linestyle=":", linewidth=1)
        axes.set_xlabel(unit)
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)

    return Chart("Throughput", f"{run['tokens_per_second']:,.0f} tokens/s on average", draw)


def _rates(
    interval_s: float, tokens: Sequence[float], seconds: float
) -> tuple[list[float], list[float]]:
    """Interval edges and tokens/s in each; a short last interval is merged into the one before."""
    edges_s = [interval_s * at for at in range(len(tokens))] + [seconds]
    counts = list(tokens)
    if len(counts) > 1 and edges_s[-1] - edges_s[-2] < interval_s / 2:
        counts[-2:] = [sum(counts[-2:])]
        del edges_s[-2]
    lengths_s = [max(end - begin, 1e-3) for begin, end in pairwise(edges_s)]
    return edges_s, [count / length for count, length in zip(counts, lengths_s, strict=True)]


def _unit(seconds: float) -> tuple[str, int]:
    if seconds >= 3 * 3600:
        return "hours", 3600
    return ("minutes", 60) if seconds >= 3 * 60 else ("seconds", 1)


def _quantiles(counts: Counter[Any]) -> str:
    median, most, high = quantile(counts, 0.5), quantile(counts, 0.95), max(counts)
    return f"median {median:,}, p95 {most:,}, longest {high:,}"
