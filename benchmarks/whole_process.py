"""Time and memory of whole commands, in turns: how long one question takes, start-up included.

    python -m benchmarks.whole_process \\
        "smol ask 'What is the capital of France?' --max-new-tokens 8" \\
        "llama-simple -m MODEL.gguf -n 8 'What is the capital of France?'"

Every command runs once beforehand, so that its files are in the page cache. What it prints on
standard output is shown then; an exit code other than 0 ends the benchmark.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path


def run(command: str) -> tuple[float, float, float, bytes]:
    """Seconds, seconds of CPU time, peak memory in MiB, and output of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"exit code {process.returncode}: {command}")
    peak_mib = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return seconds, usage.ru_utime + usage.ru_stime, peak_mib, output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="+")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    for command in args.commands:
        sys.stderr.write(f"{run(command)[3].decode().strip()[-200:]}\n")
    turns = [[run(command)[:3] for command in args.commands] for _ in range(args.runs)]
    sys.stdout.write("| command | seconds | fastest to slowest | CPU seconds | peak MiB |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for command, runs in zip(args.commands, zip(*turns, strict=True), strict=True):
        seconds, cpu, peaks = zip(*runs, strict=True)
        cells = (
            _title(command),
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
            f"{statistics.median(cpu):.2f}",
            f"{max(peaks):,.0f}",
        )
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


def _title(command: str) -> str:
    """The command without folders, and without arguments of several lines."""
    words = [word for word in shlex.split(command) if "\n" not in word]
    return " ".join(Path(word).name if "/" in word else word for word in words)


if __name__ == "__main__":
    main()
