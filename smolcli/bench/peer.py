"""transformers' `generate` on the same work: batches of 32, padded left, as most scripts do it."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from smolcli.bench.measure import Reading, Show
from smolcli.bench.work import REFERENCE_TOKENS, STORY_TOKENS, long_prompt, reference, stories
from smolcli.settings import BenchPlan
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Query
from smolcli.weights.resolve import resolve

SYSTEM = "transformers"
STATIC_BATCH = 32


class Peer:
    """A model loaded by transformers.

    Args:
        identity: of the backend that it is compared with: its model, dtype, device and threads.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        folder = resolve(identity["model"]).folder
        dtype = getattr(torch, identity["dtype"])
        self._num_threads = identity["threads"]
        self._chat = ChatTokenizer.load(folder)
        self._device = identity["device"]
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(self._device)
        self._eos = int(self._model.config.eos_token_id)

    def time(self, plan: BenchPlan, turn: int, show: Show) -> list[Reading]:
        """As `measure.time_backend`."""
        torch.set_num_threads(self._num_threads)
        self._generate(self._prompts(stories(1)), 2)
        readings = []

        def keep(work: str, size: int, began: float, tokens: int) -> None:
            seconds = time.perf_counter() - began
            readings.append(reading := Reading(SYSTEM, work, size, tokens, seconds))
            show(reading)

        for length in plan.prompts:
            ids, began = self._prompts([long_prompt(length, turn)]), time.perf_counter()
            self._generate(ids, 1)
            keep("prompt", length, began, len(ids[0]))
        for size in plan.sizes:
            began = time.perf_counter()
            keep("batch", size, began, self._answer(stories(size), size, STORY_TOKENS))
        if plan.num_questions:
            queries, began = reference(plan.num_questions), time.perf_counter()
            num_tokens = self._answer(queries, STATIC_BATCH, REFERENCE_TOKENS)
            keep("questions", len(queries), began, num_tokens)
        return readings

    def _prompts(self, queries: list[Query]) -> list[list[int]]:
        return [self._chat.encode(query.messages) for query in queries]

    def _answer(self, queries: list[Query], batch: int, max_new_tokens: int) -> int:
        """Answer batch by batch; returns how many tokens the answers have."""
        num_tokens = 0
        for at in range(0, len(queries), batch):
            num_tokens += self._generate(self._prompts(queries[at : at + batch]), max_new_tokens)
        return num_tokens

    def _generate(self, prompts: list[list[int]], max_new_tokens: int) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[self._eos] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self._eos,
            )
        answers = out[:, width:].tolist()
        return sum(a.index(self._eos) + 1 if self._eos in a else len(a) for a in answers)
