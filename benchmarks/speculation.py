"""What speculation gains: the same answers with and without it, in turns.

    python -m benchmarks.speculation
    python -m benchmarks.speculation --size 4 --every 3

Three kinds of work: answers that quote their prompt (summaries, extraction, corrections, changes of
code), chats with several turns, and the questions of `smol bench`. Drafts come from all answers of
the same kind so far. CPU time compares best on a busy machine. Fails if an answer differs.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from smolcli.bench.workload import reference
from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Model
from smolcli.engine.sequence import Sequence
from smolcli.engine.speculation import Speculation
from smolcli.protocol.json_text import load_json
from smolcli.protocol.query import parse_query
from smolcli.settings import DEFAULT_MODEL, Dtype, EngineSettings, QueryDefaults
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Sampling
from smolcli.weights.loader import load_model, resolve_model_config
from smolcli.weights.resolve import resolve

TASKS = Path(__file__).with_suffix(".jsonl")


@dataclass(slots=True)
class Cost:
    """Totals of one kind of work, without prefill."""

    num_tokens: int = 0
    num_steps: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0


def load_prompts(chat: ChatTokenizer) -> dict[str, list[list[int]]]:
    """The prompts of each kind, as token ids."""
    prompts: dict[str, list[list[int]]] = defaultdict(list)
    for line in TASKS.read_bytes().splitlines():
        query = parse_query(load_json(line), QueryDefaults())
        prompts[str((query.metadata or {})["kind"])].append(chat.encode_query(query))
    prompts["questions"] = [chat.encode_query(query) for query in reference()]
    return prompts


def answer(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    cost: Cost,
    speculation: Speculation | None = None,
) -> list[list[int]]:
    """Answer prompts as one batch, and add what decoding costs to `cost`."""
    engine = Engine(model, len(prompts), 1 << 30, speculation=speculation)
    sequences = [Sequence(prompt, Sampling(max_new_tokens)) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.is_decoding for sequence in sequences):
        engine.step()
    num_steps, cpu, wall = engine.num_steps, time.process_time(), time.perf_counter()
    while engine.has_work:
        engine.step()
    cost.cpu_s += time.process_time() - cpu
    cost.wall_s += time.perf_counter() - wall
    cost.num_steps += engine.num_steps - num_steps
    cost.num_tokens += sum(sequence.num_output for sequence in sequences)
    return [sequence.output_ids for sequence in sequences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto", choices=get_args(Dtype))
    parser.add_argument("--size", type=int, default=1, help="answers at once")
    parser.add_argument("--every", type=int, default=1, help="use every n-th prompt")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args()
    folder = resolve(args.model).folder
    settings = EngineSettings(args.model, args.dtype, threads=args.threads)
    config = resolve_model_config(settings, folder)
    model = load_model(folder, config.dtype, config.device, config.kernels, config.threads)
    columns = ("kind", "tokens", "steps", "with", "accepted", "drafted", "CPU time", "wall time")
    table = Table(*columns, box=None)
    for kind, prompts in load_prompts(ChatTokenizer.load(folder)).items():
        chosen = prompts[:: args.every]
        plain, drafting, speculation = Cost(), Cost(), Speculation()
        for at in range(0, len(chosen), args.size):
            batch = chosen[at : at + args.size]
            expected = answer(model, batch, args.max_new_tokens, plain)
            got = answer(model, batch, args.max_new_tokens, drafting, speculation)
            assert got == expected, "speculation changed an answer"
        table.add_row(
            kind,
            f"{plain.num_tokens:,}",
            f"{plain.num_steps:,}",
            f"{drafting.num_steps:,}",
            f"{speculation.num_accepted:,}",
            f"{speculation.num_drafted:,}",
            f"{plain.cpu_s / drafting.cpu_s:.2f}x",
            f"{plain.wall_s / drafting.wall_s:.2f}x",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
