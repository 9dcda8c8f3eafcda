"""The engine on the real SmolLM2-135M-Instruct against transformers."""

import json
from collections.abc import Iterator
from itertools import chain
from operator import eq
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from kernel_tools import KERNELS, WAYS, load

from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Model
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message, Sampling

pytestmark = pytest.mark.model

QUESTIONS = Path(__file__).parents[1] / "smolcli" / "bench" / "reference.jsonl"
NUM_QUESTIONS = 20
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def prompts(model_folder: Path) -> list[list[int]]:
    chat = ChatTokenizer.load(model_folder)
    lines = QUESTIONS.read_text("utf-8").splitlines()[:NUM_QUESTIONS]
    return [chat.encode([Message("user", json.loads(line)["user_prompt"])]) for line in lines]


@pytest.fixture(scope="module", params=WAYS)
def ours(request: pytest.FixtureRequest, model_folder: Path) -> Model:
    return load(model_folder, "float32", request.param)


@pytest.fixture(scope="module")
def theirs(model_folder: Path) -> Iterator[Any]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    yield model
    del model


@pytest.fixture(scope="module")
def expected(theirs: Any, prompts: list[list[int]]) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=2
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def generate(
    model: Model, prompts: list[list[int]], max_batch_size: int, max_step_tokens: int = 256
) -> list[list[int]]:
    engine = Engine(model, max_batch_size, 1 << 30, max_step_tokens=max_step_tokens)
    sequences = [Sequence(p, Sampling(max_new_tokens=NUM_TOKENS)) for p in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    return [s.output_ids for s in sequences]


@pytest.mark.parametrize("max_batch_size", [NUM_QUESTIONS, 1])
def test_float32_equals_transformers(
    ours: Model, prompts: list[list[int]], expected: list[list[int]], max_batch_size: int
) -> None:
    """Token for token, as one batch and one by one."""
    assert generate(ours, prompts, max_batch_size) == expected


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_nearly_always_agrees(
    model_folder: Path, prompts: list[list[int]], expected: list[list[int]], kernels: str
) -> None:
    """Teacher-forced on float32's answers, the most likely token is the same 97 % of the time."""
    half = load(model_folder, "bfloat16", kernels)
    said = [*chain.from_iterable(next_tokens(half, prompts, expected))]
    forced = [*chain.from_iterable(expected)]
    assert sum(map(eq, said, forced)) / len(forced) >= 0.97


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_native_kernels_are_batch_invariant(
    model_folder: Path, prompts: list[list[int]], dtype: Literal["bfloat16", "float32"]
) -> None:
    """Even near ties are the same alone, in a batch, and with prompts split into chunks."""
    model = load(model_folder, dtype, "native")
    alone = generate(model, prompts, 1)
    assert generate(model, prompts, NUM_QUESTIONS) == alone
    assert generate(model, prompts[::-1], 7, max_step_tokens=16)[::-1] == alone


def next_tokens(
    model: Model, prompts: list[list[int]], answers: list[list[int]]
) -> list[list[int]]:
    """The most likely token at each position of the answers, teacher-forced."""
    said: list[list[int]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        cache, sequence = model.make_kv_cache(0), Sequence(prompt)
        cache.allocate(sequence)
        said.append([])
        for token in answer:
            cache.ensure_capacity(sequence)
            work = ScheduledSequence(sequence, sequence.num_cached, len(sequence.token_ids))
            said[-1] += model.head.best(model.forward(cache.make_batch([work])))
            sequence.num_cached = work.stop
            sequence.token_ids.append(token)
    return said
