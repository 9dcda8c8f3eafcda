"""Whether a run may resume an existing output, and which of its lines have changed since."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

from smolcli.batch.journal import LineSet
from smolcli.batch.manifest import Manifest, load_manifest, manifest_path
from smolcli.batch.run import Run
from smolcli.data.jsonl import is_stream
from smolcli.errors import ResumeError, UsageError
from smolcli.settings import RunSettings


def previous_manifest(settings: RunSettings) -> Manifest | None:
    """The manifest of the run to resume; None if there is nothing to resume.

    Raises:
        ResumeError: the output cannot be resumed, or its manifest cannot be read.
    """
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


def check_resumable(settings: RunSettings, previous: Manifest, manifest: Manifest) -> None:
    """Check that a run continues an earlier session, whose output must not be mixed or lost.

    Args:
        settings: the run's settings.
        previous: what the earlier session recorded.
        manifest: what the run will record, as far as it is known before the backend is open.

    Raises:
        ResumeError: the inputs, the settings or the path of failed lines differ.
    """
    _check_files(previous, manifest, settings.output)
    previous.check_same(replace(manifest, backend=previous.backend), settings.output)
    _check_errors_path(settings, previous, manifest)


def changed_lines(run: Run, previous: Manifest) -> LineSet:
    """The answered lines that have changed since.

    Args:
        run: the run, which has read its output.
        previous: what the earlier session recorded.

    Raises:
        ResumeError: lines were inserted or removed, or it is unknown which ones changed.
    """
    settings, changed = run.settings, LineSet()
    old, new = previous.digests, run.scan.rows
    assert new is not None
    if old is None:
        if previous.input_sha256 != run.scan.sha256:
            raise run.input_changed("", can_retry=False)
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
        raise run.input_changed(where, can_retry=False)
    if changed:
        run.check_line_numbers()
    return changed


def check_changes(run: Run, previous: Manifest | None) -> None:
    """Reject resuming if an answered line changed, and retrying before every line is answered.

    Args:
        run: the run, whose changed lines are known.
        previous: what an earlier session recorded, if there was one.

    Raises:
        ResumeError: a line changed, and `--retry-errors` is not set.
        UsageError: `--retry-errors` is set, but the output is not complete.
    """
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
        raise run.input_changed(f" at {run.scan.inputs.where(first)}")


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
        what = f"other inputs (input {place + 1} was {old[place]}{found})"
    raise ResumeError(
        f"{output} was made from {what}; add new inputs only after the earlier ones, "
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
