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
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from smolcli.backends.base import Backend, OpenBackend
from smolcli.batch.checks import check_options, check_paths
from smolcli.batch.input_scan import scan_input
from smolcli.batch.journal import Journal
from smolcli.batch.manifest import Manifest, load_manifest, save_manifest
from smolcli.batch.output_lock import output_lock
from smolcli.batch.progress import RunProgress
from smolcli.batch.resume import (
    changed_lines,
    check_changes,
    check_resumable,
    previous_manifest,
)
from smolcli.batch.run import Run
from smolcli.batch.statistics import RunStatistics
from smolcli.data.compression import without_codec_suffix
from smolcli.data.detection import table_kind
from smolcli.data.inputs import Inputs
from smolcli.data.jsonl import is_stream
from smolcli.data.table_writer import write_table
from smolcli.errors import UsageError
from smolcli.settings import RunSettings


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
            _write_table(settings, settings.table)
    if settings.errors is not None and statistics.failed:
        progress.note(f"failed lines are in {settings.errors}")
    return statistics


def _run_to_file(
    settings: RunSettings, open_backend: OpenBackend, progress: RunProgress
) -> RunStatistics:
    output, previous = settings.output, previous_manifest(settings)
    run = _new_run(settings, progress, previous)
    manifest = Manifest.of(settings, run.scan, run.seed, run.created, run.run_id)
    if previous is not None:
        check_resumable(settings, previous, manifest)
        run = run.resume()
        run = replace(run, changed=changed_lines(run, previous))
        manifest = replace(manifest.with_rows_of(previous), table_sha256=previous.table_sha256)
    check_changes(run, previous)
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


def _write_table(settings: RunSettings, table: Path) -> None:
    """Write the table, and record which results it has, so that a later run keeps the user's edits.

    Raises:
        RunError: the table cannot be written.
    """
    journal, fields, overwrite = settings.output, settings.rows.fields, settings.overwrite
    if table_kind(table) != "sqlite":
        write_table(journal, table, settings.table_name, fields, overwrite)
        return
    manifest = load_manifest(journal)
    with journal.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_current = manifest.table_sha256 == digest
    write_table(journal, table, settings.table_name, fields, overwrite, is_current)
    if not is_current:
        save_manifest(replace(manifest, table_sha256=digest), journal)


def _complete(run: Run, previous: Manifest | None, manifest: Manifest) -> RunStatistics:
    """Finish whatever a kill after the last answer left undone; otherwise touch nothing."""
    statistics = run.journal.statistics.snapshot()
    if manifest != previous:
        save_manifest(manifest, run.settings.output)
    run.finalize(is_new=False)
    if manifest.statistics is None:
        save_manifest(replace(manifest, statistics=asdict(statistics)), run.settings.output)
    return statistics


def _nothing_to_do(run: Run) -> str:
    if run.settings.retry_errors and run.journal.statistics.num_failed:
        return "every failed line is invalid input, so none can be retried"
    return "there is nothing to do"


@contextmanager
def _opened(
    settings: RunSettings, open_backend: OpenBackend, progress: RunProgress
) -> Iterator[Backend]:
    with progress.waiting("starting"):
        backend = open_backend(settings.engine)
    with closing(backend):
        yield backend


def _new_run(settings: RunSettings, progress: RunProgress, previous: Manifest | None = None) -> Run:
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
