"""Exit codes of the `smol` command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit code of a `smol` process."""

    OK = 0
    FAILED = 1  # the command failed; output written so far is kept
    USAGE = 2  # invalid options or arguments
    SOME_FAILED = 3  # finished, but some queries failed
    INTERRUPTED = 130  # Ctrl-C
