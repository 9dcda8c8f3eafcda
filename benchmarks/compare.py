"""Throughput and memory of several systems on the reference questions, in turns.

    python -m benchmarks.compare --max-new-tokens 64 \\
        "PYTHON benchmarks/peer_smol.py --slots 64" \\
        "PYTHON benchmarks/peer_openvino.py openvino-int8 --slots 64" \\
        "PYTHON benchmarks/peer_llama.py MODEL.gguf FOLDER --slots 16"
    python -m benchmarks.compare --questions 16 --ignore-eos \\
        "PYTHON benchmarks/peer_smol.py --slots 1" \\
        "PYTHON benchmarks/peer_llama.py MODEL.gguf FOLDER --slots 1 --ik"

The ratios relate to the first system. PYTHON is the interpreter of each system's own environment.
With --slots 1, questions are asked one after another, otherwise all at once.
"""

import argparse
import statistics
import sys

from benchmarks.turns import Run, System, systems


def markdown(found: dict[System, list[Run]]) -> str:
    """A table with the median of each system, its range, and the first one's advantage."""
    lines = [
        "| system | slots | tokens/s | worst to best | speed of the first | peak MiB | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    first = None
    for system, runs in found.items():
        rates = [run.tokens_per_s for run in runs]
        median = statistics.median(rates)
        first = first or median
        cells = (
            system.name,
            f"{system.slots}",
            f"{median:,.0f}",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
            f"{first / median:.2f}",
            f"{max(run.peak_mib for run in runs):,.0f}",
            f"{statistics.mean(run.tokens for run in runs):,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", help="commands, the first of which is compared")
    parser.add_argument("--questions", type=int, default=64, help="how many of the 64 to ask")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--ignore-eos", action="store_true", help="make all answers equally long")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    options = [f"--questions={args.questions}", f"--max-new-tokens={args.max_new_tokens}"]
    with systems(args.systems, options + ["--ignore-eos"] * args.ignore_eos) as running:
        found: dict[System, list[Run]] = {system: [] for system in running}
        for _ in range(args.runs):
            for system, runs in found.items():
                runs.append(system.run())
                last = f"{system.name}, {system.slots} slots: {runs[-1].tokens_per_s:,.1f} tokens/s"
                sys.stderr.write(f"{last}\n")
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
