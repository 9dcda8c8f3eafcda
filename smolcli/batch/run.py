"""One run: an input, an output, and what the output holds so far."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

from smolcli.backends.base import Backend
from smolcli.batch.chat_ids import ChatIds
from smolcli.batch.input_scan import InputScan
from smolcli.batch.journal import (
    Entry,
    Journal,
    LineSet,
    content_size,
    is_split,
    read_entries,
    read_journal,
    rewrite,
    split_errors,
)
from smolcli.batch.manifest import Manifest, save_manifest
from smolcli.batch.pipeline import answer_all, read_ahead
from smolcli.batch.progress import RunProgress
from smolcli.batch.queries import QueryReader
from smolcli.batch.statistics import RunStatistics, StatisticsCollector
from smolcli.batch.truncation import PromptTruncation
from smolcli.data.compression import codec_of_name
from smolcli.data.jsonl import ResultWriter, encode, is_stream, replacing_lines
from smolcli.data.rows import Row
from smolcli.errors import BackendError, ResumeError, RunError, counted
from smolcli.protocol.line_formats import LineFormat, RunInfo
from smolcli.protocol.openai import model_name
from smolcli.settings import RunSettings
from smolcli.types import Query, Result


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

    def input_changed(self, where: str, can_retry: bool = True) -> ResumeError:
        """The error for an input that changed after some of its lines were answered.

        Args:
            where: the first line that changed, as the end of a phrase; "" if it is unknown.
            can_retry: whether `--retry-errors` can answer the changed lines again.
        """
        retry = "answer the changed lines again with --retry-errors, " if can_retry else ""
        return ResumeError(
            f"{self.scan.inputs} changed{where} since {self.settings.output} was written; "
            f"restore it, {retry}or choose another --output"
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
                        raise self.input_changed(f" at {self.scan.inputs.where(entry.line)}")
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
