"""Output of the measurements: a table, JSON and a plot."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from smolcli.bench.measure import Reading, medians
from smolcli.errors import InputError, RunError, UsageError, cannot_write, error_reason
from smolcli.protocol.json_text import parse_json

TITLES = {
    "prompt": "prompt of {} words",
    "batch": "batch of {} answers",
    "questions": "{} reference questions",
}


def print_table(readings: Sequence[Reading], identity: Mapping[str, Any], file: IO[str]) -> None:
    """Print the medians, and the model and machine that they were measured with.

    Args:
        readings: all measurements.
        identity: identity of the backend.
        file: where to print.
    """
    console = Console(file=file)
    console.print(_table(medians(readings)))
    facts = [identity.get(name) for name in ("model", "dtype", "device")]
    facts.append(f"{identity.get('kernels')} kernels")
    console.print(", ".join([*map(str, facts), *_machine(identity)]), style="dim", highlight=False)


def write_json(readings: Sequence[Reading], identity: Mapping[str, Any], path: Path) -> None:
    """Write all measurements, their medians, and the model and machine, as JSON.

    Args:
        readings: all measurements.
        identity: identity of the backend.
        path: the file to write.

    Raises:
        RunError: the file cannot be written.
    """
    record = {
        "backend": dict(identity),
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "medians": [_record(r) for r in medians(readings)],
        "readings": [_record(r) for r in readings],
    }
    try:
        path.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", "utf-8")
    except OSError as exc:
        raise cannot_write(path, exc) from exc


def read_peers(path: Path) -> list[Reading]:
    """Read the lines that benchmarks/peer_*.py printed: system, tokens and tokens_per_second.

    Raises:
        InputError: the file cannot be read, or contains something else.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as exc:
        raise InputError(f"cannot read --peers {path}: {error_reason(exc)}") from exc
    try:
        records = [parse_json(line) for line in lines if line]
        return [
            Reading(r["system"], "questions", 64, r["tokens"], r["tokens"] / r["tokens_per_second"])
            for r in records
        ]
    except (ValueError, LookupError, TypeError, ZeroDivisionError) as exc:
        raise InputError(
            f"{path} does not contain the output of benchmarks/peer_*.py: {exc}"
        ) from exc


def _record(reading: Reading) -> dict[str, Any]:
    return asdict(reading) | {"tokens_per_second": round(reading.tokens_per_second, 1)}


def _machine(identity: Mapping[str, Any]) -> list[str]:
    versions = [f"{name} {v}" for name, v in identity.get("versions", {}).items()]
    return [_processor(), f"{identity.get('threads')} threads", *versions]


def _processor() -> str:
    """The name of the processor, in full on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _table(readings: Sequence[Reading]) -> Table:
    """A row for each kind of work, a column for each system, and the speed-up of the first one."""
    systems = list(dict.fromkeys(r.system for r in readings))
    rates = {(r.system, r.work, r.size): r.tokens_per_second for r in readings}
    shown = Table("tokens/s", *systems, *(f"vs. {s}" for s in systems[1:]), box=None)
    for work, size in dict.fromkeys((r.work, r.size) for r in readings):
        found = [rates.get((system, work, size)) for system in systems]
        first, *others = found
        shown.add_row(
            TITLES[work].format(size),
            *("" if rate is None else f"{rate:,.0f}" for rate in found),
            *("" if not (first and rate) else f"{first / rate:.2f} x" for rate in others),
        )
    return shown


def check_targets(json_path: Path | None, plot_path: Path | None) -> None:
    """Reject files that cannot be written before minutes of measuring are lost on them.

    Args:
        json_path: file for the measurements, if any.
        plot_path: file for the plot, if any.

    Raises:
        UsageError: a file cannot be written, or matplotlib cannot write its format.
        RunError: matplotlib is not installed.
    """
    for path in filter(None, (json_path, plot_path)):
        if os.path.isdir(path) or not os.path.isdir(path.parent):
            raise UsageError(
                f"cannot write {path}: it is a directory, or its parent directory does not exist"
            )
    if plot_path is None:
        return
    if plot_path == json_path:
        raise UsageError("--json and --plot name the same file")
    formats = _figure_class()().canvas.get_supported_filetypes()
    if plot_path.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(f"--plot {plot_path}: unknown format; use a .svg or .png file")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise RunError("a plot needs matplotlib: pip install 'smolcli[report]'") from exc
    return Figure


def plot(all_readings: Sequence[Reading], path: Path) -> None:
    """Plot tokens per second over batch size, and for the real questions, as .svg or .png.

    Raises:
        RunError: matplotlib is not installed, or the file cannot be written.
    """
    readings = medians(all_readings)
    figure = _figure_class()(figsize=(9, 3.6), layout="constrained")
    lines, bars = figure.subplots(1, 2)
    for system in dict.fromkeys(r.system for r in readings):
        batches = [r for r in readings if (r.system, r.work) == (system, "batch")]
        if batches:
            rates = [r.tokens_per_second for r in batches]
            lines.plot([r.size for r in batches], rates, marker="o", label=system)
    lines.set(xscale="log", xlabel="batch size", ylabel="tokens/s", ylim=(0, None))
    lines.set_xticks(sorted({r.size for r in readings if r.work == "batch"}))
    lines.xaxis.set_major_formatter("{x:.0f}")
    lines.minorticks_off()
    lines.legend(frameon=False)
    questions = [r for r in readings if r.work == "questions"]
    drawn = bars.barh([r.system for r in questions], [r.tokens_per_second for r in questions])
    bars.bar_label(drawn, fmt="{:,.0f}", padding=3)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set(xlabel="tokens/s, reference questions")
    for axes in (lines, bars):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as exc:
        raise RunError(f"cannot write the plot {path}: {exc}") from exc
