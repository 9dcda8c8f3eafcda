"""Helpers that run `run_file` in this process, in one to be killed, or without a package."""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fakes import EchoBackend

from smolcli.backends.base import Backend, OpenBackend
from smolcli.batch.progress import LogProgress
from smolcli.batch.runner import run_file
from smolcli.batch.statistics import RunStatistics
from smolcli.settings import EngineSettings, RunSettings

SLOW_RUN = """
import pickle, sys, time
sys.path.insert(0, sys.argv[1])
from fakes import EchoBackend
from smolcli.batch.progress import LogProgress
from smolcli.batch.runner import run_file

class Slow(EchoBackend):
    def answer(self, query):
        time.sleep(float(sys.argv[3]))
        return super().answer(query)

job = pickle.loads(bytes.fromhex(sys.argv[2]))
run_file(job, lambda settings: print("open", flush=True) or Slow(), LogProgress())
"""


def answer(job: RunSettings, open_backend: OpenBackend = EchoBackend) -> RunStatistics:
    return run_file(job, open_backend, LogProgress())


def no_backend(settings: EngineSettings) -> Backend:
    raise AssertionError("the backend must not be opened")


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answer_until_killed(job: RunSettings, seconds: float, seconds_each: float) -> int:
    """Kill a run `seconds` after its backend opened; returns the exit status."""
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", SLOW_RUN, folder, pickle.dumps(job).hex(), str(seconds_each)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        process.kill()
    return process.returncode


def smol_without(package: str, *args: object) -> "subprocess.CompletedProcess[bytes]":
    """Run the command as if `package` were not installed."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from smolcli.cli.main import app\n"
        f"sys.argv = {['smol', *map(str, args)]!r}\n"
        "app()"
    )
    folder = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=folder)
