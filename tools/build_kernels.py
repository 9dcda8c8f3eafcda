"""Compile the native kernels into smolcli/engine/native.

    python -m tools.build_kernels          # the variants that this CPU can run, if out of date
    python -m tools.build_kernels --all    # all variants of this architecture

Uses the compiler in CC, otherwise cc, gcc or clang, otherwise the `ziglang` package. hatch_build.py
calls `build` when a wheel is built or the package is installed in editable mode.
"""

import argparse
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from smolcli.engine.native.library import (
    CPU_LIBRARY,
    FOLDER,
    VARIANTS,
    Variant,
    library_path,
    machine_name,
    source_hash,
)

SYSTEM_COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-warning-option", "-Wno-enum-compare"),
    "-Wno-unknown-pragmas",
)


class BuildError(Exception):
    """The kernels cannot be compiled; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A platform to build for.

    Args:
        system: "linux", "darwin" or "windows".
        machine: "x86_64" or "aarch64".
        zig: its target name in zig; None for this machine, with the system's compiler if any.
        tag: platform tag of its wheels; None for the tag of this machine.
    """

    system: str
    machine: str
    zig: str | None = None
    tag: str | None = None


WHEEL_TARGETS = {
    "linux-x86_64": Target("linux", "x86_64", "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64"),
    "linux-aarch64": Target("linux", "aarch64", "aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64"),
    "macos-arm64": Target("darwin", "aarch64", "aarch64-macos.11.0", "macosx_11_0_arm64"),
    "macos-x86_64": Target("darwin", "x86_64", "x86_64-macos.10.15", "macosx_10_15_x86_64"),
    "windows-x86_64": Target("windows", "x86_64", "x86_64-windows-gnu", "win_amd64"),
}


def host() -> Target:
    """This machine."""
    return Target(platform.system().lower(), machine_name())


def system_compiler() -> list[str] | None:
    """The command of the system's C compiler, if any."""
    if chosen := os.environ.get("CC"):
        return chosen.split()
    path = next(filter(None, map(shutil.which, SYSTEM_COMPILERS)), None)
    return [path] if path else None


def build(target: Target, folder: Path = FOLDER, runnable_only: bool = False) -> list[Path]:
    """Compile the libraries of a target that are missing or out of date.

    Args:
        target: what to build for.
        folder: the directory to write to.
        runnable_only: skip variants that this CPU cannot run.

    Returns:
        All libraries of the target; empty if its architecture is not supported.

    Raises:
        BuildError: no compiler was found, or it failed.
    """
    variants = [v for v in VARIANTS.values() if v.machine == target.machine]
    if not variants:
        return []
    cpu = library_path(CPU_LIBRARY, target.system, folder)
    _compile_all([_cpu_job(target, cpu)])
    if runnable_only:
        found = ctypes.CDLL(str(cpu)).smol_cpu_variants()
        variants = [v for v in variants if v.bit & found]
    jobs = [_kernel_job(target, v, dtype, folder) for v in variants for dtype in v.products]
    _compile_all(jobs)
    return [cpu, *(job.path for job in jobs)]


@dataclass(frozen=True, slots=True)
class _Job:
    """A library to compile.

    Flags of a CPU variant are for compiling only: zig would build a C library of its own for every
    CPU that it links for.
    """

    path: Path
    compiler: list[str]
    flags: list[str]
    sources: list[str]
    libraries: list[str]


def _cpu_job(target: Target, path: Path) -> _Job:
    return _Job(path, _compiler(target), _defines(), ["cpu.c"], [])


def _kernel_job(target: Target, variant: Variant, dtype: str, folder: Path) -> _Job:
    is_zig = _uses_zig(target)
    flags = [variant.zig_flag if is_zig else variant.gcc_flag]
    if target.machine == "aarch64" and not is_zig:
        flags += ["-fno-tree-pre"]  # gcc 12 has an internal error with vectors of two registers
    formats = {"BF16_WEIGHTS": dtype == "bfloat16", "BF16_PRODUCTS": variant.products[dtype]}
    flags += [f"-D{name}={int(value)}" for name, value in formats.items()]
    if target.system == "windows":
        libraries = ["-lapi-ms-win-core-synch-l1-2-0"]
    else:
        libraries = ["-lm", *(["-pthread"] if target.system == "linux" else [])]
    path = library_path(f"{variant.name}-{dtype}", target.system, folder)
    sources = ["kernels.c", "team.c"]
    return _Job(path, _compiler(target), [*flags, *_defines()], sources, libraries)


def _defines() -> list[str]:
    return [f'-DSOURCE_HASH="{source_hash()}"']


def _uses_zig(target: Target) -> bool:
    return target.zig is not None or system_compiler() is None


def _compiler(target: Target) -> list[str]:
    pic = [] if target.system == "windows" else ["-fPIC"]
    if not _uses_zig(target):
        command = system_compiler()
        assert command
        return [*command, *pic]
    if find_spec("ziglang") is None:
        raise BuildError("no C compiler found: install gcc or clang, or `pip install ziglang`")
    where = ["-target", target.zig] if target.zig else []
    return [sys.executable, "-m", "ziglang", "cc", "-s", *where, *pic]


def _compile_all(jobs: Iterable[_Job]) -> None:
    stale = [job for job in jobs if not _is_current(job.path)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_compile, stale))


def _is_current(path: Path) -> bool:
    return path.exists() and f"smol-source-{source_hash()}".encode() in path.read_bytes()


def _compile(job: _Job) -> None:
    """Compile to a temporary file first, so that concurrent or killed builds leave no torn file."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.path.parent, prefix=".build-") as folder:
        objects = [str(Path(folder) / f"{name}.o") for name in job.sources]
        for name, made in zip(job.sources, objects, strict=True):
            _run([*job.compiler, *FLAGS, *job.flags, "-c", str(FOLDER / name), "-o", made])
        linked = Path(folder) / job.path.name
        _run([*job.compiler, "-shared", *objects, *job.libraries, "-o", str(linked)])
        os.replace(linked, job.path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--all", action="store_true", help="also build variants that this CPU cannot run"
    )
    args = parser.parse_args()
    try:
        libraries = build(host(), runnable_only=not args.all)
    except BuildError as exc:
        sys.exit(str(exc))
    sys.stdout.write("".join(f"{path}\n" for path in libraries))


if __name__ == "__main__":
    main()
