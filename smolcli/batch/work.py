"""What one run has to do: answer the lines that are left, or the failed ones once more."""

import hashlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from smolcli.backends.base import Backend
from smolcli.batch.input_scan import Survey
from smolcli.batch.journal import (
    Journal,
    Written,
    is_split_off,
    put_back,
    read_journal,
    read_output,
    split_off,
)
from smolcli.batch.manifest import Manifest, save_manifest
from smolcli.batch.pipeline import answer_all, read_ahead
from smolcli.batch.progress import Display
from smolcli.batch.queries import ChatIds, Questions
from smolcli.batch.statistics import RunReport, Tally
from smolcli.data.jsonl import ResultWriter, encode, is_stream, replacing
from smolcli.data.reader import read_rows, row_numbers
from smolcli.data.rows import Row
from smolcli.errors import BackendError, ResumeRefused, RunError
from smolcli.protocol.line_formats import Formats, LineFormat, OwnFormat
from smolcli.protocol.openai import model_name
from smolcli.protocol.openai_batch import BatchFormat
from smolcli.settings import RunSettings
from smolcli.types import ErrorCode, Query, Result

# These befell the backend, not the query: a later run may do better, so they are no answers.
_BACKEND_FAULTS = frozenset(
    {ErrorCode.BACKEND_ERROR, ErrorCode.OVERLOADED, ErrorCode.TIMEOUT, ErrorCode.CANCELLED}
)


@dataclass(frozen=True, slots=True)
class Work:
    """The lines of an input that a journal does not have; all that decides their results."""

    settings: RunSettings
    survey: Survey
    seed: int
    created: int
    journal: Journal

    @property
    def is_done(self) -> bool:
        """Whether no line is left."""
        num_lines = self.survey.num_lines
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

    def do(self, backend: Backend, display: Display, manifest: Manifest | None = None) -> RunReport:
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

    def retry(self, backend: Backend, display: Display, manifest: Manifest) -> RunReport:
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

    def _write_all(self, backend: Backend, writer: ResultWriter, display: Display) -> None:
        questions = self._questions(self._rows_left(), self.journal.ids, backend)
        items = read_ahead(questions) if is_stream(self.settings.input) else questions
        tally = self.journal.tally
        with self._shown(display, tally), closing(_answers(items, backend)) as answers:
            for result in answers:
                writer.write(questions.format.record(result))
                tally.add(result)
                display.update()

    def _replace_failed(self, backend: Backend, display: Display, manifest: Manifest) -> Tally:
        failed, tally = self.journal.failed_lines, self.journal.tally
        tally.failed.clear()  # each is counted anew
        questions = self._questions(self._rows(), ChatIds(), backend)
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
                    data = encode(questions.format.record(result))
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
    def _shown(self, display: Display, tally: Tally) -> Iterator[None]:
        tally.begin()
        display.start(self.survey.num_lines, tally)
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

    def _questions(
        self, rows: Iterable[Row], ids: ChatIds, backend: Backend | None = None
    ) -> Questions:
        sampling = replace(self.settings.defaults.sampling, seed=self.seed)
        defaults = replace(self.settings.defaults, sampling=sampling)
        return Questions(rows, defaults, ids, self._formats(backend), self.survey.is_batch)

    def _formats(self, backend: Backend | None = None) -> Formats:
        """Both formats; without a backend for reading only."""
        model = self.settings.engine.model
        if backend is not None:
            model = backend.identity().get("model", model)
        run = f"{self.survey.sha256 or self.created}/{self.seed}"
        run_id = hashlib.blake2b(run.encode(), digest_size=8).hexdigest()
        timings = self.settings.with_timings
        batch = BatchFormat(run_id, self.created, model_name(model), timings)
        return Formats(OwnFormat(timings), batch)

    @property
    def _format(self) -> LineFormat:
        """The format of an input that is no stream."""
        return self._formats().of(bool(self.survey.is_batch))

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
