"""The standard streams: log lines on stderr, and typed or piped lines on stdin."""

import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from prompt_toolkit.history import History


def replace_closed_streams() -> None:
    """Replace standard streams that are closed, so that none is None.

    Opening something in their place also keeps files opened later from taking their descriptors.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull)  # noqa: SIM115  read-only: losing data is an error
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def log_to_stderr(is_quiet: bool = False) -> None:
    """Log progress and warnings to stderr, or errors only."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for name in ("smolcli.batch", "smolcli.weights", "smolcli.backends"):
        logging.getLogger(name).setLevel(logging.ERROR if is_quiet else logging.INFO)


def is_interactive() -> bool:
    """Whether both stdin and stdout are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def is_redirected(stream: TextIO) -> bool:
    """Whether a stream is a pipe or a file, rather than a terminal or another device."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except OSError:
        return True  # a stream in memory
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def piped_lines() -> Iterator[str]:
    """The lines of stdin, with invalid UTF-8 replaced."""
    for line in sys.stdin.buffer:
        yield line.decode(errors="replace").rstrip("\r\n")


def typed_lines(
    words: Sequence[str], history: Path, notify: Callable[[str], None]
) -> Iterator[str]:
    """Prompt for lines until Ctrl-D; pasted text of several lines counts as one.

    Args:
        words: completions for the Tab key.
        history: file with earlier lines, which the arrow keys recall.
        notify: shows a hint to the user.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: PromptSession[str] = PromptSession(
        "> ",
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        history=_open_history(history),
    )
    while True:
        try:
            line = session.prompt()
        except KeyboardInterrupt:
            notify("Ctrl-D quits, /help lists the commands")
            continue
        except EOFError:
            return
        yield line.encode(errors="replace").decode()


def _open_history(path: Path) -> "History":
    """A history file that only its owner can read, or memory if the disk is not writable."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return FileHistory(path)
    except OSError:
        return InMemoryHistory()
