"""`smol run`: answers one input into one output, resumable at any point.

A run finds its output in one of three states and brings it to the last one:

- new or partial: `Run.answer_remaining` appends the missing results in input order.
- answered: every line has its result; `Run.finalize` repairs a torn end or splits off errors.
- complete: the manifest has the statistics. The output is left alone, except that
  `--retry-errors` replaces its failed lines with `Run.retry_failed`.

The manifest is written before the first result and completed after the last, so that a kill
between any two steps leaves a state that the same command continues from.
"""

import hashlib
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from smolcli.backends.base import Backend
from smolcli.batch.checks import check_options, check_paths
from smolcli.batch.input_scan import InputScan, scan_input
from smolcli.batch.journal import (
    Entry,
    Journal,
    LineSet,
    content_size,
    is_split,
    output_lock,
    read_entries,
    read_journal,
    rewrite,
    split_errors,
)
from smolcli.batch.manifest import Manifest, load_manifest, manifest_path, save_manifest
from smolcli.batch.pipeline import answer_all, read_ahead
from smolcli.batch.progress import RunProgress
from smolcli.batch.queries import ChatIds, QueryReader
from smolcli.batch.statistics import RunStatistics, StatisticsCollector
from smolcli.batch.truncation import PromptTruncation
from smolcli.data.compression import codec_of_name, without_codec_suffix
from smolcli.data.inputs import Inputs
from smolcli.data.jsonl import ResultWriter, encode, is_stream, replacing_lines
from smolcli.data.rows import Row
from smolcli.data.table_writer import write_table
from smolcli.errors import BackendError, ResumeError, RunError, UsageError, counted
from smolcli.protocol.line_formats import LineFormat, RunInfo
from smolcli.protocol.openai import model_name
from smolcli.settings import EngineSettings, RunSettings
from smolcli.types import Query, Result

OpenBackend = Callable[[EngineSettings], Backend]


def default_output(input: Path) -> Path:
    """The output next to an input file, or stdout for a stream.

    Raises:
        UsageError: `input` has no file name.
    """
    if is_stream(input):
        return Path("-")
    if not input.name:
        raise UsageError(f"{input} is a directory; pass a file of queries")
    stem = without_codec_suffix(input).stem
    return input.with_name(f"{stem}.results.jsonl")


def run_file(
    settings: RunSettings, open_backend: OpenBackend, progress: RunProgress
) -> RunStatistics:
    """Answer every line of an input, resuming where an earlier run stopped.

    Args:
        settings: input, output, defaults for the queries, and engine.
        open_backend: opens the backend; called only if there is something to answer.
        progress: receives progress and messages.

    Returns:
        Statistics of the whole output, including lines from earlier sessions.

    Raises:
        UsageError: the output is the input, is in use, or was made with other settings.
        RunError: input, output, model or backend failed; results written so far are kept.
    """
    check_options(settings)
    if is_stream(settings.output):
        run = _new_run(settings, progress)
        with _opened(settings, open_backend, progress) as backend:
            return run.answer_remaining(backend, progress)
    check_paths(settings)
    with ExitStack() as locks:
        for path in filter(None, (settings.output, settings.errors)):
            locks.enter_context(output_lock(path))
        statistics = _run_to_file(settings, open_backend, progress)
        if settings.table is not None:
            fields, overwrite = settings.rows.fields, settings.overwrite
            write_table(settings.output, settings.table, settings.table_name, fields, overwrite)
    if settings.errors is not None and statistics.failed:
        progress.note(f"failed lines are in {settings.errors}")
    return statistics


def _run_to_file(
    settings: RunSettings, open_backend: OpenBackend, progress: RunProgress
) -> RunStatistics:
    output, previous = settings.output, _previous_manifest(settings)
    run = _new_run(settings, progress, previous)
    manifest = Manifest.of(settings, run.scan, run.seed, run.created, run.run_id)
    if previous is not None:
        _check_files(previous, manifest, output)
        previous.check_same(replace(manifest, backend=previous.backend), output)
        _check_errors_path(settings, previous, manifest)
        run = run.resume()
        run = replace(run, changed=_changed_lines(run, previous))
        manifest = replace(manifest, rows=_extended(manifest, previous))
    _check_changes(run, previous)
    is_retry = settings.retry_errors and run.has_lines_to_retry
    has_same_model = previous is None or previous.has_model_of(settings.engine)
    if run.is_answered and not is_retry and has_same_model:
        progress.note(f"{settings.table or output} is complete; {_nothing_to_do(run)}")
        return _complete(run, previous, replace(previous or manifest, errors=manifest.errors))
    with _opened(settings, open_backend, progress) as backend:
        manifest = replace(manifest, backend=backend.identity())
        if previous is not None:
            previous.check_same(manifest, output)
            if changes := previous.version_changes(manifest):
                progress.note(f"versions differ from those of the earlier session: {changes}")
        if is_retry:
            assert previous is not None
            statistics = run.retry_failed(backend, progress, replace(manifest, rows=previous.rows))
        else:
            statistics = run.answer_remaining(backend, progress, manifest)
    run.scan.check_unchanged()
    run.finalize(is_new=True)
    save_manifest(replace(manifest, statistics=asdict(statistics)), output)
    return statistics


def _complete(run: "Run", previous: Manifest | None, manifest: Manifest) -> RunStatistics:
    """Finish whatever a kill after the last answer left undone; otherwise touch nothing."""
    statistics = run.journal.statistics.snapshot()
    if manifest != previous:
        save_manifest(manifest, run.settings.output)
    run.finalize(is_new=False)
    if manifest.statistics is None:
        save_manifest(replace(manifest, statistics=asdict(statistics)), run.settings.output)
    return statistics


def _nothing_to_do(run: "Run") -> str:
    if run.settings.retry_errors and run.journal.statistics.num_failed:
        return "every failed line is invalid input, so none can be retried"
    return "there is nothing to do"


@contextmanager
def _opened(
    settings: RunSettings, open_backend: OpenBackend, progress: RunProgress
) -> Iterator[Backend]:
    with progress.waiting("starting the backend"):
        backend = open_backend(settings.engine)
    with closing(backend):
        yield backend


def _new_run(
    settings: RunSettings, progress: RunProgress, previous: Manifest | None = None
) -> "Run":
    """A run that has not read its output yet, with the seed and date of the run that it resumes."""
    with progress.waiting(f"reading {Inputs.of(settings)}"):
        scan = scan_input(settings)
    if settings.seed is not None:
        seed = settings.seed
    else:
        seed = secrets.randbelow(2**31) if previous is None else previous.seed
    created = scan.modified if previous is None else previous.created
    run_id = previous.run_id if previous is not None else None
    if run_id is None:
        sha256 = scan.sha256 if previous is None else previous.input_sha256
        source = f"{sha256 or created}/{seed}"
        run_id = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    return Run(settings, scan, seed, created, run_id, Journal())


def _changed_lines(run: "Run", previous: Manifest) -> LineSet:
    """The answered lines that have changed since.

    Raises:
        ResumeError: lines were inserted or removed, or it is unknown which ones changed.
    """
    settings, changed = run.settings, LineSet()
    old, new = previous.digests, run.scan.rows
    assert new is not None
    if old is None:
        if previous.input_sha256 != run.scan.sha256:
            raise _input_changed(run, "", can_retry=False)
        return changed
    num_answered = run.journal.statistics.num_lines
    numbers = run.scan.inputs.numbers()
    index = -1
    for index, number in enumerate(islice(numbers, min(num_answered, len(new)))):
        if index >= len(old) or old[index] != new[index]:
            changed.add(number)
    is_limited = settings.limit is not None and len(new) == settings.limit
    if index + 1 < num_answered and not is_limited:
        where = f": it ends after {index + 1:,} of {num_answered:,} lines"
        raise _input_changed(run, where, can_retry=False)
    if changed:
        run.check_line_numbers()
    return changed


def _check_changes(run: "Run", previous: Manifest | None) -> None:
    """Reject resuming if an answered line changed, and retrying before every line is answered."""
    settings = run.settings
    first = next(iter(run.changed), None)
    if settings.retry_errors and (previous is None or not run.is_answered):
        num_answered = run.journal.statistics.num_lines
        remedy = "run without --retry-errors first"
        if first is not None:
            where = run.scan.inputs.where(first)
            remedy = f"{where} changed; run with --retry-errors --limit {num_answered} first"
        raise UsageError(f"{settings.output} is not complete; {remedy}")
    if first is not None and not settings.retry_errors:
        raise _input_changed(run, f" at {run.scan.inputs.where(first)}")


def _input_changed(run: "Run", where: str, can_retry: bool = True) -> ResumeError:
    retry = "answer the changed lines again with --retry-errors, " if can_retry else ""
    return ResumeError(
        f"{run.scan.inputs} changed{where} since {run.settings.output} was written; restore it, "
        f"{retry}or choose another --output"
    )


def _extended(manifest: Manifest, previous: Manifest) -> str | None:
    """The digests of the rows, keeping earlier ones beyond a smaller `--limit`."""
    old, new = previous.digests, manifest.digests
    return manifest.rows if old is None or new is None else new.extended(old).text


@dataclass(frozen=True, slots=True)
class Run:
    """An input, an output, and what the output holds so far.

    Args:
        settings: the run's settings.
        scan: facts about the input.
        seed: the run's seed: given, picked at random, or from the manifest.
        created: `created` of answers in OpenAI's format, in seconds since the epoch.
        run_id: part of the ids of answers in OpenAI's format.
        journal: the results that the output holds.
        changed: lines of the input that changed after they were answered.
    """

    settings: RunSettings
    scan: InputScan
    seed: int
    created: int
    run_id: str
    journal: Journal
    changed: LineSet = field(default_factory=LineSet)

    @property
    def is_answered(self) -> bool:
        """Whether every line has a result; never true for a stream."""
        num_lines = self.scan.num_lines
        return num_lines is not None and self.journal.statistics.num_lines >= num_lines

    @property
    def has_lines_to_retry(self) -> bool:
        """Whether any line changed, or failed and is a valid query that may succeed this time."""
        failed = self.journal.failed_lines
        items = self._read_queries(self._rows(), ChatIds(), is_for_model=False)
        return bool(self.changed) or any(
            isinstance(item, Query) and item.line in failed for item in items
        )

    def resume(self) -> "Run":
        """The same run with its output read.

        Raises:
            ResumeError: the output lacks the result of a line before its last one.
        """
        run = replace(self, journal=read_journal(self._entries()))
        if not run.is_answered:
            run._check_gaps()
        return run

    def check_line_numbers(self) -> None:
        """Check that each result still belongs to a line of the input.

        Raises:
            ResumeError: lines were inserted or removed.
        """
        inputs = self.scan.inputs
        for entry, number in zip(self._entries(), inputs.numbers(), strict=False):
            if entry.line != number:
                raise ResumeError(
                    f"{inputs} changed at {inputs.where(min(entry.line, number))} since "
                    f"{self.settings.output} was written: lines were inserted or removed; "
                    "restore it, or choose another --output"
                )

    def answer_remaining(
        self, backend: Backend, progress: RunProgress, manifest: Manifest | None = None
    ) -> RunStatistics:
        """Append the results of all remaining lines.

        Args:
            backend: answers the queries.
            progress: receives progress.
            manifest: written before the first result; None for stdout.
        """
        with closing(self._open_writer()) as writer:
            if manifest is not None:
                save_manifest(manifest, self.settings.output)
            try:
                self._append_results(backend, writer, progress)
            except (KeyboardInterrupt, RunError):
                progress.note(self._how_to_resume())
                raise
        return self.journal.statistics.snapshot(backend.counters())

    def retry_failed(
        self, backend: Backend, progress: RunProgress, manifest: Manifest
    ) -> RunStatistics:
        """Answer failed and changed lines again, and replace the output once all are done.

        Lines beyond `--limit` keep their results.

        Args:
            backend: answers the queries.
            progress: receives progress.
            manifest: written before the output is replaced, with the digests of the old input.
        """
        try:
            statistics = self._replace_failed(backend, progress, manifest)
        except (KeyboardInterrupt, RunError):
            progress.note(f"{self.settings.output} is unchanged; run the same command to try again")
            raise
        return statistics.snapshot(backend.counters())

    def finalize(self, is_new: bool) -> None:
        """Bring a fully answered output into its final form.

        Args:
            is_new: whether this session wrote results; otherwise only damage is repaired.
        """
        output, errors = self.settings.output, self.settings.errors
        if errors is not None:
            if is_new or not is_split(output, errors, self.journal):
                split_errors(output, errors, self._format)
        elif self._is_compressed and (is_new or not self._is_intact):
            rewrite(output, errors, self._format)  # as few members as possible, always the same
        elif not (is_new or self._is_intact):
            self._open_writer().close()

    @property
    def _is_compressed(self) -> bool:
        return codec_of_name(self.settings.output) is not None

    @property
    def _is_intact(self) -> bool:
        """Whether the output has all results of the journal and no torn line after them."""
        output = self.settings.output
        return output.exists() and content_size(output) == self.journal.num_bytes

    def _check_gaps(self) -> None:
        numbers = islice(self.scan.inputs.numbers(), self.settings.limit)
        num_lines = sum(number <= self.journal.last_line for number in numbers)
        if num_lines != self.journal.statistics.num_lines:
            raise ResumeError(
                f"{self.settings.output} lacks results of lines before its last one, or lines "
                f"were inserted into {self.scan.inputs}; "
                "choose another --output, or start over with --overwrite"
            )

    def _entries(self) -> Iterator[Entry]:
        return read_entries(self.settings.output, self.settings.errors, self._format)

    def _open_writer(self) -> ResultWriter:
        """Open the output for appending, with failed lines merged and a torn line cut off."""
        output, errors = self.settings.output, self.settings.errors
        num_bytes = self.journal.num_bytes
        has_errors_file = errors is not None and errors.exists()
        if num_bytes and (has_errors_file or self._is_compressed):
            rewrite(output, errors, self._format)
            num_bytes = output.stat().st_size
        elif errors is not None and has_errors_file:
            errors.unlink()
        return ResultWriter(output, num_bytes)

    def _append_results(
        self, backend: Backend, writer: ResultWriter, progress: RunProgress
    ) -> None:
        rows = self._remaining_rows()
        reader = self._read_queries(rows, self.journal.ids)
        info = self._run_info(backend)
        items: Iterable[Query | Result | None] = reader
        with ExitStack() as stack:
            if is_stream(self.settings.input):
                items = read_ahead(reader)  # on a thread that may be blocked in it
            else:
                stack.enter_context(closing(rows))
            statistics = self.journal.statistics
            stack.enter_context(self._shown(progress, statistics))
            results = stack.enter_context(closing(self._answers(items, backend)))
            for result in results:
                writer.write(reader.format.for_run(info).record(result))
                statistics.add(result)
                progress.update()

    def _replace_failed(
        self, backend: Backend, progress: RunProgress, manifest: Manifest
    ) -> StatisticsCollector:
        retried, statistics = self._lines_to_retry(), StatisticsCollector()
        for entry in self._entries():
            if entry.line not in retried:
                statistics.add(entry.result)
        rows = self._rows()
        reader = self._read_queries(rows, ChatIds())
        format = reader.format.for_run(self._run_info(backend))
        items = (item for item in reader if item.line in retried)
        with (
            closing(rows),
            self._shown(progress, statistics),
            closing(self._answers(items, backend)) as results,
            replacing_lines(self.settings.output) as file,
        ):
            for entry in self._entries():
                data = entry.data
                if entry.line in retried:
                    result = next(results, None)
                    if result is None or result.line != entry.line:
                        raise _input_changed(self, f" at {self.scan.inputs.where(entry.line)}")
                    data = encode(format.record(result))
                    statistics.add(result)
                    progress.update()
                file.write(data)
            save_manifest(manifest, self.settings.output)  # without statistics until finalized
        return statistics

    def _lines_to_retry(self) -> LineSet:
        lines = LineSet()
        numbers = self.scan.inputs.numbers()
        for number in islice(numbers, self.settings.limit):
            if number in self.journal.failed_lines or number in self.changed:
                lines.add(number)
        return lines

    @contextmanager
    def _shown(self, progress: RunProgress, statistics: StatisticsCollector) -> Iterator[None]:
        statistics.begin()
        num_lines = self.scan.num_lines
        if num_lines is not None:
            num_lines = max(num_lines, self.journal.statistics.num_lines)
        progress.start(num_lines, statistics)
        try:
            yield
        finally:
            progress.stop()

    def _answers(
        self, items: Iterable[Query | Result | None], backend: Backend
    ) -> Generator[Result]:
        with closing(answer_all(items, backend)) as results:
            for result in results:
                # A later run may succeed, so these end the run instead of being written as results.
                if result.error_code is not None and result.error_code.is_transient:
                    where = self.scan.inputs.where(result.line or 0)
                    raise BackendError(f"{where} was not answered: {result.error}")
                yield result

    def _rows(self, after: int = 0, num_done: int = 0) -> Generator[Row]:
        """Rows after a number, up to the limit; close it, so that no input stays open."""
        limit = self.settings.limit
        with closing(self.scan.inputs.read(after)) as rows:
            yield from islice(rows, None if limit is None else max(limit - num_done, 0))

    def _remaining_rows(self) -> Generator[Row]:
        """Rows after the last one that has a result; the journal has all before it."""
        return self._rows(self.journal.last_line, self.journal.statistics.num_lines)

    def _read_queries(
        self, rows: Iterable[Row], ids: ChatIds, is_for_model: bool = True
    ) -> QueryReader:
        sampling = replace(self.settings.defaults.sampling, seed=self.seed)
        defaults = replace(self.settings.defaults, sampling=sampling)
        fit = None
        if is_for_model and self.settings.rows.truncate_prompt:
            fit = PromptTruncation(self.settings.engine).fit
        return QueryReader(rows, defaults, ids, self.scan.format, fit)

    def _run_info(self, backend: Backend | None = None) -> RunInfo:
        """What result lines say about this run; without a backend, enough to read them back."""
        model = self.settings.engine.model
        if backend is not None:
            model = backend.identity().get("model", model)
        name = self.settings.model_name or model_name(model)
        return RunInfo(self.run_id, self.created, name, self.settings.with_timings)

    @property
    def _format(self) -> LineFormat:
        """The line format of an input file."""
        assert self.scan.format is not None
        return self.scan.format.for_run(self._run_info())

    def _how_to_resume(self) -> str:
        results = counted(self.journal.statistics.num_lines, "result")
        if is_stream(self.settings.output) or is_stream(self.settings.input):
            return f"wrote {results}; a run from stdin or to stdout cannot be resumed"
        return f"{self.settings.output} has {results}; run the same command to resume"


def _previous_manifest(settings: RunSettings) -> Manifest | None:
    """The manifest of the run to resume; None if there is nothing to resume."""
    output, errors = settings.output, settings.errors
    if settings.overwrite or not (_has_content(output) or _has_content(errors)):
        return None
    if is_stream(settings.input):
        raise ResumeError(
            f"{output} exists, and a run from stdin cannot be resumed; "
            "choose another --output, or start over with --overwrite"
        )
    if not _has_content(output) and not manifest_path(output).exists():
        raise _foreign_errors(settings)
    return load_manifest(output)


def _check_files(previous: Manifest, manifest: Manifest, output: Path) -> None:
    """Reject input files unless they are those of the earlier session, with others after them."""
    old, new = (None if each is None else list(each) for each in (previous.files, manifest.files))
    if old == new or (old and new and new[: len(old)] == old):
        return
    if old is None or new is None:
        what = "one input" if old is None else f"{len(old):,} inputs"
    else:
        place = next(i for i, name in enumerate(old) if [name] != new[i : i + 1])
        found = f", not {new[place]}" if place < len(new) else ", which is missing"
        what = f"other inputs: number {place + 1} was {old[place]}{found}"
    raise ResumeError(
        f"{output} was made from {what}; add inputs after the earlier ones only, "
        "choose another --output, or start over with --overwrite"
    )


def _check_errors_path(settings: RunSettings, previous: Manifest, manifest: Manifest) -> None:
    """Reject a run that would lose failed lines or overwrite the file of another run."""
    if previous.errors == manifest.errors:
        return
    if previous.errors is not None and _has_content(Path(previous.errors)):
        raise ResumeError(
            f"the failed lines of {settings.output} are in {previous.errors}; "
            "pass it as --errors, or start over with --overwrite"
        )
    if _has_content(settings.errors):
        raise _foreign_errors(settings)


def _foreign_errors(settings: RunSettings) -> ResumeError:
    return ResumeError(
        f"{settings.errors} exists but does not belong to {settings.output}; "
        "choose another --errors, or start over with --overwrite"
    )


def _has_content(path: Path | None) -> bool:
    return path is not None and path.exists() and path.stat().st_size > 0
