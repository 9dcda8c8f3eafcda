"""transformers' `generate` on the same work, in static batches padded on the left."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from smolcli.bench.measure import Reading, Show
from smolcli.bench.workload import long_prompt, reference, stories
from smolcli.errors import UsageError
from smolcli.settings import BenchPlan
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Query
from smolcli.weights import gguf_weights
from smolcli.weights.resolve import resolve
from smolcli.weights.store import GGUF_FILE

SYSTEM = "transformers"
STATIC_BATCH = 32


@dataclass(frozen=True, slots=True)
class StaticRun:
    """What a run over queries took.

    Args:
        tokens: generated in total.
        model_calls: forward passes.
        latencies: seconds from the start of the run to each answer.
    """

    tokens: int
    model_calls: int
    latencies: list[float]


class TransformersPeer:
    """A model loaded by transformers.

    Args:
        identity: identity of the backend to compare with: `model`, `dtype`, `device`, `threads`.
            transformers computes in float32 if the dtype is int8.

    Raises:
        UsageError: the model is a GGUF file, which transformers cannot load without accelerate.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        folder = resolve(identity["model"]).folder
        dtype = getattr(torch, {"int8": "float32"}.get(identity["dtype"], identity["dtype"]))
        self._num_threads = identity["threads"]
        self._chat = ChatTokenizer.load(folder)
        self._device = identity["device"]
        gguf = {"gguf_file": GGUF_FILE} if gguf_weights.is_in(folder) else {}
        if gguf and find_spec("accelerate") is None:
            raise UsageError(
                "transformers needs accelerate to load a GGUF model: pip install accelerate"
            )
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **gguf)
        self._model = model.to(self._device)
        self._eos = int(self._model.config.eos_token_id)

    def time(self, plan: BenchPlan, turn: int, show: Show) -> list[Reading]:
        """Measure a plan; see `measure.time_backend`."""
        self.answer([*stories(1, max_new_tokens=2)], 1)
        readings = []

        def keep(work: str, size: int, queries: Sequence[Query], batch_size: int) -> None:
            began = time.perf_counter()
            tokens = self.answer(queries, batch_size).tokens
            seconds = time.perf_counter() - began
            if work == "prompt":
                tokens = len(self._chat.encode(queries[0].messages))
            readings.append(reading := Reading(SYSTEM, work, size, tokens, seconds))
            show(reading)

        for length in plan.prompts:
            keep("prompt", length, [long_prompt(length, turn)], 1)
        for size in plan.sizes:
            keep("batch", size, stories(size), size)
        if plan.num_questions:
            queries = reference(plan.num_questions)
            keep("questions", len(queries), queries, STATIC_BATCH)
        return readings

    def answer(self, queries: Sequence[Query], batch_size: int) -> StaticRun:
        """Answer queries in batches, each of which runs until its longest answer ends.

        Args:
            queries: decoded greedily, each up to its own `max_new_tokens`.
            batch_size: number of queries per batch.
        """
        torch.set_num_threads(self._num_threads)
        began, tokens, calls = time.perf_counter(), 0, 0
        latencies: list[float] = []
        for at in range(0, len(queries), batch_size):
            batch = queries[at : at + batch_size]
            answers = self._generate(batch)
            calls += len(answers[0])
            for row, query in zip(answers, batch, strict=True):
                answer = row[: query.sampling.max_new_tokens]
                has_ended = self._eos in answer
                tokens += answer.index(self._eos) + 1 if has_ended else len(answer)
            latencies += [time.perf_counter() - began] * len(batch)
        return StaticRun(tokens, calls, latencies)

    def _generate(self, batch: Sequence[Query]) -> list[list[int]]:
        """Token ids of the answers, (batch, longest answer)."""
        prompts = [self._chat.encode(query.messages) for query in batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[self._eos] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max(query.sampling.max_new_tokens for query in batch),
                do_sample=False,
                pad_token_id=self._eos,
            )
        answers: list[list[int]] = out[:, width:].tolist()
        return answers
