"""Runs several systems in turns, so that a slow phase of the machine affects all of them.

A system is the command of a script that calls `peer_record.measure`. All systems are started, load
their model and stay in memory; each then answers the questions whenever its turn comes.
"""

import json
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One run of a system; the peak is that of its process so far."""

    tokens: int
    seconds: float
    peak_mib: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, eq=False)
class System:
    """A running system."""

    name: str
    slots: int
    _process: subprocess.Popen[str]

    def run(self) -> Run:
        """Let the system answer its questions once."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Run(**_read(self._process))


@contextmanager
def systems(commands: list[str], options: list[str]) -> Iterator[list[System]]:
    """Start the systems one after another, and stop them at the end.

    Args:
        commands: the command of each system.
        options: options of `peer_record.add_options` for all of them.

    Raises:
        SystemExit: a system ended before it was ready.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(_system(command, options)) for command in commands]


@contextmanager
def _system(command: str, options: list[str]) -> Iterator[System]:
    words = [*shlex.split(command), *options, "--turns"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        facts = _read(process)
        yield System(f"{facts['system']}, {facts['model']}", facts["slots"], process)
        assert process.stdin
        process.stdin.close()


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON, skipping what libraries print."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise SystemExit(f"{process.args!r} ended early, with exit code {process.wait()}")
