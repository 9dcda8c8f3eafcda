"""Exit codes of the `smol` command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a finished `smol` process tells the shell."""

    OK = 0
    FAILED = 1  # the command failed; output written so far stays
    USAGE = 2  # invalid options or arguments
    SOME_FAILED = 3  # finished, but some queries failed
    INTERRUPTED = 130  # Ctrl-C
