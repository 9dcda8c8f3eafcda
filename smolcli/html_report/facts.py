"""Counts and distributions of a result file, gathered in one pass."""

import heapq
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolcli.batch.manifest import Manifest, load_manifest
from smolcli.data.jsonl import Line, read_lines
from smolcli.data.rows import format_of, journal_path
from smolcli.errors import InputError, ResumeRefused

NUM_EXAMPLES = 3
NUM_SLOWEST = 10


@dataclass(frozen=True, slots=True)
class Example:
    """A failed line."""

    line: int | None
    chat_id: str | None
    message: str


@dataclass(frozen=True, slots=True, order=True)
class SlowAnswer:
    """An answer and its latencies."""

    total_s: float
    first_token_s: float
    queue_s: float
    completion_tokens: int
    line: int
    chat_id: str


@dataclass(slots=True)
class Facts:
    """Counts and distributions of one result file.

    Memory grows with the number of distinct values, not with the number of results.
    """

    path: Path
    manifest: Manifest | None = None
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Counter[int] = field(default_factory=Counter)
    completion_tokens: Counter[int] = field(default_factory=Counter)
    latencies_s: Counter[float] = field(default_factory=Counter)  # rounded to three digits
    slowest: list[SlowAnswer] = field(default_factory=list)

    @property
    def num_answered(self) -> int:
        """Number of answered lines."""
        return self.finish_reasons.total()

    @property
    def num_lines(self) -> int:
        """Number of lines."""
        return self.num_answered + self.errors.total()

    @property
    def run(self) -> dict[str, Any]:
        """The run's statistics from its manifest; empty if it is incomplete or has no manifest."""
        return (self.manifest.statistics if self.manifest else None) or {}

    def add(self, record: dict[str, Any]) -> None:
        """Count one result."""
        if "error_code" in record:
            code = record["error_code"]
            example = Example(record.get("line"), record["chat_id"], record["error"])
            self.examples[code] = [*self.examples.get(code, ()), example][:NUM_EXAMPLES]
            self.errors[code] += 1
            return
        usage = record["usage"]
        self.prompt_tokens[int(usage["prompt_tokens"])] += 1
        self.completion_tokens[int(usage["completion_tokens"])] += 1
        self.finish_reasons[record["finish_reason"] or "not reported"] += 1
        if "timings" in record:
            self._add_timings(record)

    def _add_timings(self, record: dict[str, Any]) -> None:
        slow = SlowAnswer(
            **record["timings"],
            completion_tokens=record["usage"]["completion_tokens"],
            line=record.get("line") or 0,
            chat_id=record["chat_id"],
        )
        self.latencies_s[float(f"{slow.total_s:.3g}")] += 1
        heapq.heappush(self.slowest, slow)
        if len(self.slowest) > NUM_SLOWEST:
            heapq.heappop(self.slowest)


def gather(results: Path) -> Facts:
    """Read the results of a run; for a table, its journal.

    An incomplete last line is skipped, because the run may still be writing it.

    Raises:
        InputError: the file cannot be read, or a line is not a result.
    """
    path = journal_path(results)
    if format_of(results) is not None and not path.exists():
        raise InputError(f"cannot report on {results}: its journal {path} is missing")
    facts, torn = Facts(path, _manifest(path)), None
    for line in read_lines(path):
        if torn is not None:
            raise InputError(f"line {torn} of {path} is not a result of smol run")
        if not _take(facts, line):
            torn = line.number
    if torn is not None and not facts.num_lines:
        raise InputError(f"line {torn} of {path} is not a result of smol run")
    return facts


def _take(facts: Facts, line: Line) -> bool:
    """Count a line if it is a result; returns whether it is."""
    try:
        facts.add(json.loads(line.data or b""))
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return True


def _manifest(path: Path) -> Manifest | None:
    try:
        return load_manifest(path)
    except ResumeRefused:
        return None


def quantile(counts: Counter[Any], fraction: float) -> Any:
    """The smallest value that at least `fraction` of all do not exceed."""
    rank, num_seen = math.ceil(counts.total() * fraction), 0
    for value in sorted(counts):
        num_seen += counts[value]
        if num_seen >= rank:
            break
    return value
