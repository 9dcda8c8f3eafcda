"""Lines as somebody types them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.history import History


def is_interactive() -> bool:
    """Whether somebody sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def piped_lines() -> Iterator[str]:
    """The lines of stdin, whatever is not UTF-8 in them replaced."""
    for line in sys.stdin.buffer:
        yield line.decode(errors="replace").rstrip("\r\n")


def typed_lines(words: Sequence[str], history: Path, say: Callable[[str], None]) -> Iterator[str]:
    """Lines edited on a terminal until Ctrl-D; Tab completes `words`, arrows bring old lines back.

    Pasted text of several lines is one of ours.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: PromptSession[str] = PromptSession(
        "> ",
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        history=_history(history),
    )
    while True:
        try:
            line = session.prompt()
        except KeyboardInterrupt:
            say("Ctrl-D ends, /help lists what else there is")
            continue
        except EOFError:
            return
        yield line.encode(errors="replace").decode()


def _history(path: Path) -> "History":
    """What was typed before, on a disk that can be written for its owner's eyes only."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return FileHistory(path)
    except OSError:
        return InMemoryHistory()
