"""The kernels as a library for this CPU: compiled when they are first needed, then kept."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import CDLL
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from smolcli.engine.native.bindings import Kernels
from smolcli.settings import smol_home

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
TIMEOUT_S = 60.0


class NoKernels(Exception):
    """There is no library for this machine; the text says why."""


@cache
def load_kernels(dtype: Literal["float32", "bfloat16"]) -> Kernels:
    """The kernels for a dtype, float32 or bfloat16.

    torch has loaded OpenMP by now, so that its threads are the kernels' too.

    Raises:
        NoKernels: no compiler here makes them.
    """
    name = f"{dtype}-{_fingerprint()}.so"
    kept = smol_home() / "kernels" / name
    try:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            _compile(dtype, kept)
        return Kernels(CDLL(str(kept)), getattr(torch, dtype))
    except OSError:  # nothing can be kept there, or run from there
        return _load_elsewhere(dtype, name)


def _load_elsewhere(dtype: str, name: str) -> Kernels:
    """From a file that is gone as soon as it is loaded."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _compile(dtype, Path(folder) / name)
            return Kernels(CDLL(str(Path(folder) / name)), getattr(torch, dtype))
    except OSError as exc:
        raise NoKernels(f"a library cannot be kept or run here: {exc}") from exc


def _compile(dtype: str, path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoKernels("there is no C compiler")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        macro = f"-DBF16={int(dtype == 'bfloat16')}"
        command = [compiler, *FLAGS, macro, str(SOURCE), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as exc:
            raise NoKernels(f"{compiler} took more than {TIMEOUT_S:.0f} s") from exc
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise NoKernels(f"{compiler}: {(errors or ['failed'])[0].strip()}")
        with made.open("rb+") as file:
            os.fsync(file.fileno())  # half of a library would end the process that loads it
        os.replace(made, path)


def _fingerprint() -> str:
    """Of all that decides what a library does; homes are shared by machines."""
    parts = [SOURCE.read_text("utf-8"), *FLAGS, platform.machine(), platform.system(), _cpu()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What the CPU is and can."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
