"""The lock that keeps two runs from writing one output."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from smolcli.errors import UsageError, cannot_write


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold an exclusive lock on an output; the operating system releases it if the process dies.

    The lock file lies next to the real file, so that runs through different symbolic links to one
    output exclude each other. An existing output is locked as well, for its hard links.

    Raises:
        UsageError: another run holds the lock.
        RunError: the output cannot be written: a lock file next to it cannot be created.
    """
    target = Path(os.path.realpath(output))
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as exc:
        raise UsageError(f"another run is writing {output}") from exc
    except OSError as exc:
        raise cannot_write(output, exc) from exc
    try:
        with _locked_file(target, output):
            yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; release() does it there
            path.unlink()  # before the release, so that waiting processes notice and retry
        lock.release()


@contextmanager
def _locked_file(target: Path, output: Path) -> Iterator[None]:
    """Hold a lock on a file itself, if it exists and the system has advisory locks.

    Args:
        target: the file.
        output: its path as the user gave it, for errors.

    Raises:
        UsageError: another run holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows, whose locks would keep the writer from writing
        yield
        return
    with ExitStack() as opened:
        if target.is_file():
            try:
                file = opened.enter_context(target.open("rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                message = f"another run is writing {output} through a hard link"
                raise UsageError(message) from exc
            except OSError:  # unreadable, or no locks on this file system
                pass
        yield
