"""Generation throughput on a machine that is busy with other programs.

    python -m benchmarks.busy
    python -m benchmarks.busy --runs 5 --levels 0,1,2,4,2n \\
        --peer "PYTHON benchmarks/peer_llama.py MODEL.gguf FOLDER --slots 32" \\
        --peer "PYTHON benchmarks/peer_openvino.py openvino-int8 --slots 32"

A level is a number of busy loops of normal priority; `2n` is two loops at nice 19. In every run,
each system answers the same questions at each level in turn, so that a slow phase of the machine
affects all of them. PYTHON is the interpreter of the peer's own environment.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.turns import System, systems

SMOL = Path(__file__).with_name("peer_smol.py")
NUM_SLOTS = 32


@contextmanager
def busy_loops(level: str) -> Iterator[None]:
    """Run programs that keep the CPU busy."""
    nice = ["nice", "-n", "19"] if level.endswith("n") else []
    command = [*nice, sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(int(level.rstrip("n")))]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compare(args: argparse.Namespace) -> None:
    """Measure all systems at all levels and print a table."""
    levels = args.levels.split(",")
    smol = shlex.join([sys.executable, str(SMOL), "--dtype", args.dtype, "--slots", str(NUM_SLOTS)])
    options = [f"--questions={args.questions}", f"--max-new-tokens={args.max_new_tokens}"]
    with systems([smol, *args.peer], [*options, "--ignore-eos"]) as running:
        found: dict[tuple[System, str], list[float]] = {}
        for _ in range(args.runs):
            for level in levels:
                for system in running:
                    with busy_loops(level):
                        rate = system.run().tokens_per_s
                    found.setdefault((system, level), []).append(rate)
                    sys.stderr.write(f"{system.name}, {level} loops: {rate:,.1f} tokens/s\n")
    lines = [
        "| system | loops | median tokens/s | worst | worst of idle |",
        "|---|---|---|---|---|",
    ]
    for (system, level), values in found.items():
        idle = statistics.median(found[system, levels[0]])
        median, worst = statistics.median(values), min(values)
        cells = (system.name, level, f"{median:,.0f}", f"{worst:,.0f}", f"{worst / idle:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", default="0,1,2,4,2n")
    parser.add_argument("--peer", action="append", default=[], help="command of another system")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length of all answers")
    parser.add_argument("--dtype", default="auto", help="of smol")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
