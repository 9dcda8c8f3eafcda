"""Cost and benefit of structured output on 50 extraction tasks.

    python -m benchmarks.structured
    python -m benchmarks.structured --dtype float32

Cost: the same prompts with and without a schema, with equal numbers of tokens and equal batches,
alternating in one process. Benefit: how many answers parse and validate, and how many extracted
values are correct. Prompts contain the schema in both cases.
"""

import argparse
import json
import statistics
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
from rich.console import Console
from rich.table import Table

from smolcli.backends.local import LocalBackend, open_local
from smolcli.batch.pipeline import answer_all
from smolcli.engine.engine import Engine
from smolcli.engine.sequence import Sequence
from smolcli.protocol.answer_formats import schema_format
from smolcli.protocol.json_text import load_json
from smolcli.protocol.query import parse_query
from smolcli.settings import DEFAULT_MODEL, EngineSettings, QueryDefaults
from smolcli.text.grammar import GrammarCompiler, GrammarSpec
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Query, Result, Sampling
from smolcli.weights.loader import load_model, resolve_model_config
from smolcli.weights.resolve import resolve

QUESTIONS = Path(__file__).with_name("extraction.jsonl")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "hobbies": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
ENDLESS = schema_format({"type": "array", "items": PERSON, "minItems": 1000})


def load_queries() -> list[Query]:
    """The questions with their schemas; the expected values are in their metadata."""
    defaults = QueryDefaults(Sampling(max_new_tokens=128))
    lines = QUESTIONS.read_bytes().splitlines()
    return [parse_query(load_json(line), defaults) for line in lines]


class Cost:
    """Times decoding with and without a schema; answers never end early."""

    def __init__(self, queries: list[Query], settings: EngineSettings, num_tokens: int) -> None:
        folder = resolve(DEFAULT_MODEL).folder
        config = resolve_model_config(settings, folder)
        model = load_model(folder, config.dtype, config.device, config.kernels, config.threads)
        chat, config = ChatTokenizer.load(folder), model.config
        self._grammars = GrammarCompiler(chat.tokenizer_json, config.vocab_size, config.eos_ids)
        model.config = replace(config, eos_ids=frozenset())
        self._model = model
        self._prompts = [chat.encode(query.messages) for query in queries]
        self._sampling = Sampling(max_new_tokens=num_tokens)

    def seconds_per_token(self, batch_size: int, with_schema: bool) -> float:
        engine = Engine(self._model, batch_size, 4 << 30)
        prompts = (self._prompts * 2)[:batch_size]
        for prompt in prompts:
            constraint = self._grammars.matcher(GrammarSpec(ENDLESS)) if with_schema else None
            engine.add(Sequence(prompt, self._sampling, constraint=constraint))
        while not all(s.is_decoding for s in engine.scheduler.running) or not engine.num_steps:
            engine.step()
        began, num_tokens = time.perf_counter(), 0
        while engine.has_work:
            num_tokens += len(engine.step())
        return (time.perf_counter() - began) / num_tokens


def measure_cost(cost: Cost, batch_sizes: list[int], rounds: int) -> Table:
    table = Table("batch size", "ms per token", "with a schema", "ratio (median, range)")
    for batch_size in batch_sizes:
        pairs = [
            [cost.seconds_per_token(batch_size, with_schema) for with_schema in (False, True)]
            for _ in range(rounds + 1)
        ][1:]  # the first warms up
        plain, constrained = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        ratios = sorted(constrained / plain for plain, constrained in pairs)
        shown = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        table.add_row(str(batch_size), f"{plain:.2f}", f"{constrained:.2f}", shown)
    return table


def parsed(text: str | None) -> Any:
    """The JSON value of an answer; None if it is not valid JSON."""
    try:
        return json.loads(text or "")
    except ValueError:
        return None


def unfenced(text: str | None) -> str:
    """An answer without the Markdown fence that a model may put around JSON."""
    return (text or "").strip().removeprefix("```json").strip("`").strip()


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def summarize(name: str, queries: list[Query], results: list[Result], seconds: float) -> list[str]:
    """A row of the table: how many answers parse and validate, and how many values are correct."""
    num_parsed = num_valid = num_unfenced = num_correct = num_values = 0
    for query, result in zip(queries, results, strict=True):
        assert query.metadata is not None
        schema, expected = query.metadata["schema"], query.metadata["expected"]
        value, lenient = parsed(result.response), parsed(unfenced(result.response))
        num_parsed += value is not None
        num_valid += is_valid(value, schema)
        num_unfenced += is_valid(lenient, schema)
        found = lenient if isinstance(lenient, dict) else {}
        num_correct += sum(found.get(key) == wanted for key, wanted in expected.items())
        num_values += len(expected)
    counts = [num_parsed, num_valid, num_unfenced]
    errors = sum(result.is_error for result in results)
    share = f"{num_correct} of {num_values}"
    return [name, *(f"{n} of {len(queries)}" for n in counts), share, str(errors), f"{seconds:.1f}"]


def measure_benefit(queries: list[Query], backend: LocalBackend) -> Table:
    names = ("mode", "parse", "validate", "validate unfenced", "values correct", "errors", "s")
    table = Table(*names)
    queries = [
        replace(q, metadata={**(q.metadata or {}), "schema": json.loads(q.format.schema)})
        for q in queries
        if q.format is not None
    ]
    for name, asked in (
        ("prompt only", [replace(query, format=None) for query in queries]),
        ("constrained", queries),
    ):
        began = time.perf_counter()
        results = list(answer_all(asked, backend))
        table.add_row(*summarize(name, queries, results, time.perf_counter() - began))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch-sizes", default="1,32")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    queries, console = load_queries(), Console()
    settings = EngineSettings(dtype=args.dtype)
    with closing(open_local(settings)) as backend:
        console.print(measure_benefit(queries, backend))
    cost = Cost(queries, settings, args.tokens)
    batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    console.print(measure_cost(cost, batch_sizes, args.rounds))


if __name__ == "__main__":
    main()
