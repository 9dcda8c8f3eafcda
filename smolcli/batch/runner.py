"""`smol run`: one file of queries to one file of results, resumable at any point."""

import hashlib
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from smolcli.backends.base import Backend
from smolcli.batch.input_scan import InputScan, scan_input
from smolcli.batch.journal import (
    Journal,
    Written,
    is_split_off,
    output_lock,
    put_back,
    read_journal,
    read_output,
    split_off,
)
from smolcli.batch.manifest import Manifest, load_manifest, manifest_path, save_manifest
from smolcli.batch.pipeline import answer_all, read_ahead
from smolcli.batch.progress import RunProgress
from smolcli.batch.queries import ChatIds, QueryReader
from smolcli.batch.statistics import RunStatistics, StatisticsCollector
from smolcli.data.jsonl import ResultWriter, encode, is_stream, replacing
from smolcli.data.reader import read_rows, row_numbers
from smolcli.data.rows import Row
from smolcli.data.table_writer import check_table, write_table
from smolcli.errors import BackendError, ResumeRefused, RunError, UsageError
from smolcli.protocol.line_formats import LineFormat, RunInfo
from smolcli.protocol.openai import model_name
from smolcli.settings import EngineSettings, RunSettings
from smolcli.types import ErrorCode, Query, Result

# These befell the backend, not the query: a later run may do better, so they are no answers.
_BACKEND_FAULTS = frozenset(
    {ErrorCode.BACKEND_ERROR, ErrorCode.OVERLOADED, ErrorCode.TIMEOUT, ErrorCode.CANCELLED}
)


@dataclass(frozen=True, slots=True)
class Work:
    """The lines of an input that a journal does not have; all that decides their results."""

    settings: RunSettings
    scan: InputScan
    seed: int
    created: int
    journal: Journal

    @property
    def is_done(self) -> bool:
        """Whether no line is left."""
        num_lines = self.scan.num_lines
        return num_lines is not None and self.journal.tally.num_lines >= num_lines

    @property
    def has_failed_queries(self) -> bool:
        """Whether a failed line of the output is one to ask the model."""
        failed = self.journal.failed_lines
        questions = self._questions(self._rows(), ChatIds())
        return any(isinstance(item, Query) and item.line in failed for item in questions)

    def go_on(self) -> "Work":
        """The same work with what the output holds taken in.

        Raises:
            ResumeRefused: where it lacks the result of a line before the last that it has.
        """
        work = replace(self, journal=read_journal(self.written))
        if not work.is_done:
            work._refuse_gaps()
        return work

    @property
    def written(self) -> Iterator[Written]:
        """What the output holds, the lines that were split off included."""
        return read_output(self.settings.output, self.settings.errors, self._format)

    def do(
        self, backend: Backend, display: RunProgress, manifest: Manifest | None = None
    ) -> RunStatistics:
        """Answer and write what is left; the manifest, where there is one, comes first."""
        with closing(self._open_writer()) as writer:
            if manifest is not None:
                save_manifest(manifest, self.settings.output)
            try:
                self._write_all(backend, writer, display)
            except (KeyboardInterrupt, RunError):
                display.note(self._how_to_resume())
                raise
        return self.journal.tally.report(backend.counters())

    def retry(self, backend: Backend, display: RunProgress, manifest: Manifest) -> RunStatistics:
        """Answer the failed lines again, and replace the output in one step when all are done."""
        try:
            tally = self._replace_failed(backend, display, manifest)
        except (KeyboardInterrupt, RunError):
            display.note(f"{self.settings.output} is as it was; the same command tries again")
            raise
        return tally.report(backend.counters())

    def finish(self, is_new: bool) -> None:
        """Give an output with every line its final form, where it may not have that yet."""
        output, errors = self.settings.output, self.settings.errors
        if errors is not None:
            if is_new or not is_split_off(output, errors, self.journal):
                split_off(output, errors, self._format)
        elif not (is_new or self._is_whole):
            self._open_writer().close()

    @property
    def _is_whole(self) -> bool:
        """Whether the output holds what the journal has, and no torn line behind it."""
        output = self.settings.output
        return output.exists() and output.stat().st_size == self.journal.num_bytes

    def _refuse_gaps(self) -> None:
        numbers = islice(row_numbers(self.settings.input, self.settings.rows), self.settings.limit)
        num_lines = sum(number <= self.journal.last_line for number in numbers)
        if num_lines != self.journal.tally.num_lines:
            raise ResumeRefused(
                f"{self.settings.output} lacks results of lines before its last one; "
                "give another --output, or --overwrite to start anew"
            )

    def _open_writer(self) -> ResultWriter:
        """The output, cut off after the last whole line, all lines in it."""
        output, errors = self.settings.output, self.settings.errors
        if errors is not None and errors.exists():
            if self.journal.num_bytes:
                put_back(output, errors, self._format)
            else:
                errors.unlink()
        return ResultWriter(output, self.journal.num_bytes)

    def _write_all(self, backend: Backend, writer: ResultWriter, display: RunProgress) -> None:
        questions = self._questions(self._rows_left(), self.journal.ids)
        run = self._run_info(backend)
        items = read_ahead(questions) if is_stream(self.settings.input) else questions
        tally = self.journal.tally
        with self._shown(display, tally), closing(_answers(items, backend)) as answers:
            for result in answers:
                writer.write(questions.format.for_run(run).record(result))
                tally.add(result)
                display.update()

    def _replace_failed(
        self, backend: Backend, display: RunProgress, manifest: Manifest
    ) -> StatisticsCollector:
        failed, tally = self.journal.failed_lines, self.journal.tally
        tally.failed.clear()  # each is counted anew
        questions = self._questions(self._rows(), ChatIds())
        format = questions.format.for_run(self._run_info(backend))
        items = (item for item in questions if item.line in failed)
        with (
            self._shown(display, tally),
            closing(_answers(items, backend)) as answers,
            replacing(self.settings.output) as file,
        ):
            for written in self.written:
                data = written.data
                if written.result.is_error:
                    result = next(answers, None)
                    if result is None:
                        raise self._changed_by_hand()
                    data = encode(format.record(result))
                    tally.add(result)
                    display.update()
                file.write(data)
            save_manifest(manifest, self.settings.output)  # without a report: it is to come
        return tally

    def _changed_by_hand(self) -> ResumeRefused:
        return ResumeRefused(
            f"{self.settings.output} has failed lines that the input lacks; --overwrite starts anew"
        )

    @contextmanager
    def _shown(self, display: RunProgress, tally: StatisticsCollector) -> Iterator[None]:
        tally.begin()
        display.start(self.scan.num_lines, tally)
        try:
            yield
        finally:
            display.stop()

    def _rows(self) -> Iterator[Row]:
        return islice(read_rows(self.settings.input, self.settings.rows), self.settings.limit)

    def _rows_left(self) -> Iterator[Row]:
        """Those behind the last that the journal has; it has all before that one."""
        settings, journal = self.settings, self.journal
        limit, num_done = settings.limit, journal.tally.num_lines
        num_left = None if limit is None else max(limit - num_done, 0)
        return islice(read_rows(settings.input, settings.rows, journal.last_line), num_left)

    def _questions(self, rows: Iterable[Row], ids: ChatIds) -> QueryReader:
        sampling = replace(self.settings.defaults.sampling, seed=self.seed)
        defaults = replace(self.settings.defaults, sampling=sampling)
        return QueryReader(rows, defaults, ids, self.scan.format)

    def _run_info(self, backend: Backend | None = None) -> RunInfo:
        """What result lines say about this run; without a backend, enough to read them back."""
        model = self.settings.engine.model
        if backend is not None:
            model = backend.identity().get("model", model)
        run = f"{self.scan.sha256 or self.created}/{self.seed}"
        run_id = hashlib.blake2b(run.encode(), digest_size=8).hexdigest()
        return RunInfo(run_id, self.created, model_name(model), self.settings.with_timings)

    @property
    def _format(self) -> LineFormat:
        """The format of an input that is not a stream."""
        assert self.scan.format is not None
        return self.scan.format.for_run(self._run_info())

    def _how_to_resume(self) -> str:
        written = f"{self.journal.tally.num_lines:,} results are in {self.settings.output}"
        if is_stream(self.settings.output) or is_stream(self.settings.input):
            return f"{written}; a run from stdin or to stdout cannot be resumed"
        return f"{written}; the same command goes on from there"


def _answers(items: Iterable[Query | Result | None], backend: Backend) -> Generator[Result]:
    with closing(answer_all(items, backend)) as results:
        for result in results:
            if result.error_code in _BACKEND_FAULTS:
                raise BackendError(f"line {result.line} got no answer: {result.error}")
            yield result


OpenBackend = Callable[[EngineSettings], Backend]


def default_output(input: Path) -> Path:
    """Where answers go by default: beside the input, and from stdin on to stdout."""
    if is_stream(input):
        return Path("-")
    if not input.name:
        raise UsageError(f"{input} is a folder; give a file of queries")
    stem = Path(input.name.removesuffix(".gz")).stem
    return input.with_name(f"{stem}.results.jsonl")


def run_file(
    settings: RunSettings, open_backend: OpenBackend, display: RunProgress
) -> RunStatistics:
    """Answer every line of an input, going on where an earlier run of the same kind ended.

    Args:
        settings: what to answer, with what, and where to.
        open_backend: called only where there is something left to answer.
        display: shown how far the work is.

    Raises:
        UsageError: where the output is the input, another run's, or made with other settings.
        RunError: where input, output, model or backend fail; what is written stays.
    """
    _check_options(settings)
    if is_stream(settings.output):
        work = _work(settings)
        with closing(open_backend(settings.engine)) as backend:
            return work.do(backend, display)
    _check_output(settings)
    with ExitStack() as locks:
        for path in filter(None, (settings.output, settings.errors)):
            locks.enter_context(output_lock(path))
        report = _run_to_file(settings, open_backend, display)
        if settings.table is not None:
            write_table(settings.output, settings.table, settings.rows.fields)
    if settings.errors is not None and report.failed:
        display.note(f"the failed lines are in {settings.errors}")
    return report


def _run_to_file(
    settings: RunSettings, open_backend: OpenBackend, display: RunProgress
) -> RunStatistics:
    output, previous = settings.output, _previous_manifest(settings)
    work = _work(settings, previous)
    manifest = Manifest.of(settings, work.scan, work.seed, work.created)
    if previous is not None:
        previous.refuse_change(replace(manifest, backend=previous.backend), output)
        _check_errors(settings, previous, manifest)
        work = work.go_on()
    if settings.retry_errors and (previous is None or not work.is_done):
        raise UsageError(f"{output} is not finished; run this without --retry-errors first")
    asks_again = settings.retry_errors and work.has_failed_queries
    if work.is_done and not asks_again and (previous is None or previous.asks_for(settings.engine)):
        display.note(f"{settings.table or output} is complete; {_nothing_to_do(work)}")
        same = replace(previous or manifest, errors=manifest.errors)
        return _leave_alone(work, previous, same)
    with closing(open_backend(settings.engine)) as backend:
        manifest = replace(manifest, backend=backend.identity())
        if previous is not None:
            previous.refuse_change(manifest, output)
            if changes := previous.version_changes(manifest):
                display.note(f"versions differ from those of the lines before: {changes}")
        answer = work.retry if asks_again else work.do
        report = answer(backend, display, manifest)
    work.scan.refuse_change(settings.input)
    work.finish(is_new=True)
    save_manifest(replace(manifest, report=asdict(report)), output)
    return report


def _work(settings: RunSettings, previous: Manifest | None = None) -> Work:
    """What is to do if nothing is done yet."""
    known = scan_input(settings)
    created = known.modified if previous is None else previous.created
    return Work(settings, known, _seed(settings, previous), created, Journal())


def _check_options(settings: RunSettings) -> None:
    """Refuse options that do not go together."""
    if is_stream(settings.input) or is_stream(settings.output):
        for option, value in (
            ("--errors", settings.errors),
            ("--retry-errors", settings.retry_errors),
        ):
            if value:
                raise UsageError(f"{option} works on files, not on stdin or stdout")
    if settings.errors is not None and is_stream(settings.errors):
        raise UsageError(f"--errors {settings.errors} is no file; give one that can be replaced")
    if settings.retry_errors and settings.overwrite:
        raise UsageError("--retry-errors and --overwrite exclude each other")


def _check_output(settings: RunSettings) -> None:
    output, errors, table = settings.output, settings.errors, settings.table
    written = [(path, "--output") for path in (table, output, manifest_path(output)) if path]
    if errors is not None:
        written.append((errors, "--errors"))
    for path, option in written:
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(
                f"{path} cannot be a file: there is no such folder, or it is one itself"
            )
        if path.exists() and settings.input.exists() and path.samefile(settings.input):
            raise UsageError(f"{path} is the input; give another {option}")
    if len({path.resolve() for path, _ in written}) < len(written):
        raise UsageError(f"{errors} is the output or its manifest; give another --errors")
    if table is not None:
        check_table(table, output, settings.rows.fields, settings.overwrite)


def _previous_manifest(settings: RunSettings) -> Manifest | None:
    """The manifest of the run to go on with; None where there is nothing to go on with."""
    output, errors = settings.output, settings.errors
    if settings.overwrite or not (_holds_any(output) or _holds_any(errors)):
        return None
    if is_stream(settings.input):
        raise ResumeRefused(
            f"{output} exists, and a run from stdin cannot be resumed; "
            "give another --output, or --overwrite to start anew"
        )
    if not _holds_any(output) and not manifest_path(output).exists():
        raise _foreign_errors(settings)
    return load_manifest(output)


def _check_errors(settings: RunSettings, previous: Manifest, manifest: Manifest) -> None:
    """Refuse to leave split off lines behind, or to write over what is none of the output's."""
    if previous.errors == manifest.errors:
        return
    if previous.errors is not None and _holds_any(Path(previous.errors)):
        raise ResumeRefused(
            f"the failed lines of {settings.output} are in {previous.errors}; "
            "give that as --errors, or --overwrite to start anew"
        )
    if _holds_any(settings.errors):
        raise _foreign_errors(settings)


def _foreign_errors(settings: RunSettings) -> ResumeRefused:
    return ResumeRefused(
        f"{settings.errors} exists, and not by a run that wrote {settings.output}; "
        "give another --errors, or --overwrite to start anew"
    )


def _holds_any(path: Path | None) -> bool:
    return path is not None and path.exists() and path.stat().st_size > 0


def _nothing_to_do(work: Work) -> str:
    if work.settings.retry_errors and work.journal.tally.num_failed:
        return "no failed line is to be asked again, for the faults are the input's own"
    return "there is nothing to do"


def _seed(settings: RunSettings, previous: Manifest | None) -> int:
    """The run's seed: given, or that of the run to go on with, or drawn."""
    if settings.seed is not None:
        return settings.seed
    return secrets.randbelow(2**31) if previous is None else previous.seed


def _leave_alone(work: Work, previous: Manifest | None, manifest: Manifest) -> RunStatistics:
    """Leave an output that has every line as it is, or complete what a kill left undone."""
    report = work.journal.tally.report()
    if manifest != previous:
        save_manifest(manifest, work.settings.output)
    work.finish(is_new=False)
    if manifest.report is None:
        save_manifest(replace(manifest, report=asdict(report)), work.settings.output)
    return report
