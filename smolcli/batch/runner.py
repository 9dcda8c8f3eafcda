"""One `smol run`: from a file of questions to a file of answers, however often it is cut short."""

import secrets
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

from smolcli.backends.base import Backend
from smolcli.batch.input_scan import survey
from smolcli.batch.journal import Journal, output_lock
from smolcli.batch.manifest import Manifest, load_manifest, manifest_path, save_manifest
from smolcli.batch.progress import Display
from smolcli.batch.statistics import RunReport
from smolcli.batch.work import Work
from smolcli.data.jsonl import is_stream
from smolcli.data.table_writer import check_table, write_table
from smolcli.errors import ResumeRefused, UsageError
from smolcli.settings import EngineSettings, RunSettings

OpenBackend = Callable[[EngineSettings], Backend]


def default_output(input: Path) -> Path:
    """Where answers go by default: beside the input, and from stdin on to stdout."""
    if is_stream(input):
        return Path("-")
    if not input.name:
        raise UsageError(f"{input} is a folder; give a file of queries")
    stem = Path(input.name.removesuffix(".gz")).stem
    return input.with_name(f"{stem}.results.jsonl")


def run_file(settings: RunSettings, open_backend: OpenBackend, display: Display) -> RunReport:
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


def _run_to_file(settings: RunSettings, open_backend: OpenBackend, display: Display) -> RunReport:
    output, previous = settings.output, _previous_manifest(settings)
    work = _work(settings, previous)
    manifest = Manifest.of(settings, work.survey, work.seed, work.created)
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
    work.survey.refuse_change(settings.input)
    work.finish(is_new=True)
    save_manifest(replace(manifest, report=asdict(report)), output)
    return report


def _work(settings: RunSettings, previous: Manifest | None = None) -> Work:
    """What is to do if nothing is done yet."""
    known = survey(settings)
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


def _leave_alone(work: Work, previous: Manifest | None, manifest: Manifest) -> RunReport:
    """Leave an output that has every line as it is, or complete what a kill left undone."""
    report = work.journal.tally.report()
    if manifest != previous:
        save_manifest(manifest, work.settings.output)
    work.finish(is_new=False)
    if manifest.report is None:
        save_manifest(replace(manifest, report=asdict(report)), work.settings.output)
    return report
