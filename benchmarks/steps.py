"""Profile of an engine step: time in the layers, in the head, and in Python.

    python -m benchmarks.steps
    python -m benchmarks.steps --dtype float32 --sizes 1,64 --threads 1

Every batch decodes answers that never end, after prompts of about 100 tokens; the table shows the
median step. To profile the kernels: `perf record -e cpu-clock python -m benchmarks.steps`.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from smolcli.bench.workload import long_prompt
from smolcli.engine.engine import Engine
from smolcli.engine.sequence import Sequence
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Sampling
from smolcli.weights.loader import load_model, resolve_model_config
from smolcli.weights.resolve import resolve

PROMPT_WORDS = 70


class TimedModel:
    """A model and head that measure their time; answers have no end token."""

    def __init__(self, model: Any) -> None:
        self.config = replace(model.config, eos_ids=frozenset())
        self.make_kv_cache = model.make_kv_cache
        self.layers_s = self.head_s = 0.0
        self._model = model

    @property
    def head(self) -> "TimedModel":
        return self

    def forward(self, batch: Any) -> Any:
        began = time.perf_counter()
        hidden = self._model.forward(batch)
        self.layers_s += time.perf_counter() - began
        return hidden

    def best(self, hidden: Any, masks: Any) -> list[int]:
        began = time.perf_counter()
        tokens: list[int] = self._model.head.best(hidden, masks)
        self.head_s += time.perf_counter() - began
        return tokens


@contextmanager
def full_batch(
    model: TimedModel, chat: ChatTokenizer, size: int, num_steps: int
) -> Iterator[Engine]:
    """An engine that has processed all prompts and only decodes."""
    engine = Engine(model, size, 8 << 30)
    for turn in range(size):
        prompt = chat.encode(long_prompt(PROMPT_WORDS, turn).messages)
        engine.add(Sequence(prompt, Sampling(max_new_tokens=num_steps + 50)))
    while engine.scheduler.num_waiting or not all(s.is_decoding for s in engine.scheduler.running):
        engine.step()
    yield engine


def measure(model: TimedModel, chat: ChatTokenizer, size: int, num_steps: int) -> list[float]:
    """Median milliseconds of a step: total, layers, head, the rest."""
    rows = []
    with full_batch(model, chat, size, num_steps) as engine:
        for _ in range(num_steps):
            model.layers_s = model.head_s = 0.0
            began = time.perf_counter()
            engine.step()
            total = time.perf_counter() - began
            parts = (total, model.layers_s, model.head_s, total - model.layers_s - model.head_s)
            rows.append([1000 * part for part in parts])
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="all cores by default")
    args = parser.parse_args()
    folder = resolve(DEFAULT_MODEL).folder
    settings = EngineSettings(dtype=args.dtype, threads=args.threads)
    config = resolve_model_config(settings, folder)
    loaded = load_model(folder, config.dtype, config.device, config.kernels, config.threads)
    model, chat = TimedModel(loaded), ChatTokenizer.load(folder)
    table = Table("sequences", "ms/step", "layers", "head", "rest", "tokens/s", box=None)
    for size in map(int, args.sizes.split(",")):
        total, *parts = measure(model, chat, size, args.steps)
        shown = [f"{part:.2f}" for part in (total, *parts)]
        table.add_row(str(size), *shown, f"{1000 * size / total:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
