"""Counts and distributions of a result file, gathered in one pass."""

import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolcli.batch.manifest import Manifest, load_manifest
from smolcli.data.detection import table_kind
from smolcli.data.jsonl import read_lines
from smolcli.data.table_writer import journal_path
from smolcli.errors import InputError, ResumeError
from smolcli.protocol.json_text import parse_json
from smolcli.protocol.line_formats import smol_record

NUM_EXAMPLES = 3
NUM_SLOWEST = 10


@dataclass(frozen=True, slots=True)
class Example:
    """A failed line."""

    line: int | None
    chat_id: str | None
    message: str
    file: str | None = None


@dataclass(frozen=True, slots=True, order=True)
class SlowAnswer:
    """An answer and its latencies."""

    total_s: float
    first_token_s: float
    queue_s: float
    completion_tokens: int
    line: int
    chat_id: str
    file: str = ""


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
    skipped: list[str] = field(default_factory=list)  # the first lines that are not results
    num_skipped: int = 0

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
        """Count one result, in smol's own format.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: the record is not a result.
        """
        if record.get("error_code") is not None:
            code = str(record["error_code"])
            example = Example(
                record.get("line"), record["chat_id"], str(record["error"]), record.get("file")
            )
            self.examples[code] = [*self.examples.get(code, ()), example][:NUM_EXAMPLES]
            self.errors[code] += 1
            return
        if record["response"] is not None and not isinstance(record["response"], str):
            raise TypeError("the response is not text")
        usage = record.get("usage") or {}
        prompt_tokens, completion_tokens = (
            int(usage[name]) if usage.get(name) is not None else None
            for name in ("prompt_tokens", "completion_tokens")
        )
        slow = _slow_answer(record, completion_tokens or 0)  # raises before anything is counted
        if prompt_tokens is not None:
            self.prompt_tokens[prompt_tokens] += 1
        if completion_tokens is not None:
            self.completion_tokens[completion_tokens] += 1
        self.finish_reasons[str(record.get("finish_reason") or "not reported")] += 1
        if slow is not None:
            self._add_timings(slow)

    def skip(self, path: Path, number: int) -> None:
        """Count a line that is not a result."""
        self.num_skipped += 1
        if len(self.skipped) < NUM_EXAMPLES:
            self.skipped.append(f"line {number:,} of {path.name}")

    @property
    def skipped_note(self) -> str:
        """Which lines were skipped, empty if none were."""
        if not self.num_skipped:
            return ""
        others = self.num_skipped - len(self.skipped)
        more = f" and {others:,} more" if others else ""
        return f"skipped {', '.join(self.skipped)}{more}: not a result"

    def _add_timings(self, slow: SlowAnswer) -> None:
        self.latencies_s[float(f"{slow.total_s:.3g}")] += 1
        heapq.heappush(self.slowest, slow)
        if len(self.slowest) > NUM_SLOWEST:
            heapq.heappop(self.slowest)


def _slow_answer(record: dict[str, Any], completion_tokens: int) -> SlowAnswer | None:
    """The latencies of an answer; None if it has none."""
    timings = record.get("timings")
    if timings is None:
        return None
    slow = SlowAnswer(
        **timings,
        completion_tokens=completion_tokens,
        line=record.get("line") or 0,
        chat_id=record["chat_id"],
        file=record.get("file") or "",
    )
    if not all(map(math.isfinite, (slow.total_s, slow.first_token_s, slow.queue_s))):
        raise ValueError("a latency is not finite")
    return slow


def gather(results: Path) -> Facts:
    """Read the results of a run, or an output file of OpenAI's batch API.

    For a table, its journal is read; failed lines that `--errors` moved are read as well. Lines
    that are not results are skipped and counted, such as a torn last line.

    Raises:
        InputError: the file cannot be read, or none of its lines is a result.
    """
    path = journal_path(results)
    if table_kind(results) is not None and not path.exists():
        raise InputError(f"cannot report on {results}: its journal {path} is missing")
    facts = Facts(path, _manifest(path))
    for file in (path, _errors_file(facts.manifest)):
        if file is not None:
            _read(facts, file)
    if facts.num_skipped and not facts.num_lines:
        raise InputError(
            f"{results} has no results: {facts.skipped[0]} is not a result; pass the output of "
            "smol run or of OpenAI's batch API"
        )
    return facts


def _errors_file(manifest: Manifest | None) -> Path | None:
    path = Path(manifest.errors) if manifest is not None and manifest.errors else None
    return path if path is not None and path.exists() else None


def _read(facts: Facts, path: Path) -> None:
    for line in read_lines(path):
        try:
            facts.add(smol_record(parse_json(line.data or b"")))
        except (ValueError, LookupError, TypeError, AttributeError):
            facts.skip(path, line.number)


def _manifest(path: Path) -> Manifest | None:
    try:
        return load_manifest(path)
    except ResumeError:
        return None


def quantile(counts: Counter[Any], fraction: float) -> Any:
    """The smallest value that at least the given fraction of values do not exceed."""
    rank, num_seen = math.ceil(counts.total() * fraction), 0
    for value in sorted(counts):
        num_seen += counts[value]
        if num_seen >= rank:
            break
    return value
