"""The engine on the real SmolLM2-135M-Instruct against transformers."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, get_tensor_name_map
from kernel_tools import GPU, KERNELS, load

from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Model
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.settings import ResolvedDtype
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message, Sampling
from smolcli.weights import gguf_weights
from smolcli.weights.store import GGUF_FILE

pytestmark = pytest.mark.model

QUESTIONS = Path(__file__).parents[1] / "smolcli" / "bench" / "reference.jsonl"
NUM_QUESTIONS = 20
NUM_ALONE = 2  # of these, computed one by one
NUM_SLOW = 8  # by torch, and in bfloat16, which is slow without instructions for it
NUM_TOKENS = 32
EOS = PADDING = 2


@pytest.fixture(scope="module")
def prompts(model_folder: Path) -> list[list[int]]:
    chat = ChatTokenizer.load(model_folder)
    lines = QUESTIONS.read_text("utf-8").splitlines()[:NUM_QUESTIONS]
    return [chat.encode([Message("user", json.loads(line)["user_prompt"])]) for line in lines]


@pytest.fixture(scope="module")
def theirs(model_folder: Path) -> Iterator[Any]:
    from transformers import LlamaForCausalLM

    gguf: dict[str, Any] = {"gguf_file": GGUF_FILE} if gguf_weights.is_in(model_folder) else {}
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the file twice and makes the same map for each of 397 modules
        patch.setattr("gguf.GGUFReader", cache(GGUFReader))
        patch.setattr("gguf.get_tensor_name_map", cache(get_tensor_name_map))
        # gguf takes 150,000 slices of the file, which are slow in a memory map
        patch.setattr("numpy.memmap", lambda path, **_: np.fromfile(path, np.uint8))
        model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **gguf)
    yield model
    del model


@pytest.fixture(scope="module")
def expected(theirs: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Generated in one batch, padded on the left, which takes a tenth of the time."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PADDING] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=PADDING
    )
    answers = out[:, longest:].tolist()
    return [answer[: answer.index(EOS) + 1] if EOS in answer else answer for answer in answers]


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


# graphs: see test_engine.py
@pytest.mark.parametrize("kernels", [*KERNELS, *GPU])
def test_float32_equals_transformers(
    model_folder: Path, prompts: list[list[int]], expected: list[list[int]], kernels: str
) -> None:
    """Token for token, as one batch and one by one."""
    model = load(model_folder, "float32", kernels)
    count = NUM_SLOW if kernels == "torch" else NUM_QUESTIONS
    assert generate(model, prompts[:count], count) == expected[:count]
    assert generate(model, prompts[:NUM_ALONE], 1) == expected[:NUM_ALONE]


def test_prompts_in_chunks_equal_transformers(
    model_folder: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """In another order and in other batches, too."""
    model = load(model_folder, "float32", "native")
    assert generate(model, prompts[::-1], 7, max_step_tokens=16)[::-1] == expected


@pytest.mark.parametrize(
    ("dtype", "kernels"), [("bfloat16", "native"), ("bfloat16", "torch"), ("int8", "native")]
)
def test_rounded_dtypes_nearly_always_agree(
    model_folder: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    dtype: ResolvedDtype,
    kernels: str,
) -> None:
    """Teacher-forced on float32's answers, the most likely token is the same 97 % of the time."""
    half = load(model_folder, dtype, kernels)
    num_questions = NUM_QUESTIONS if kernels == "native" else NUM_SLOW
    answers = expected[:num_questions]
    said = [*chain.from_iterable(next_tokens(half, prompts[:num_questions], answers))]
    forced = [*chain.from_iterable(answers)]
    assert sum(map(eq, said, forced)) / len(forced) >= 0.97


def test_bfloat16_is_batch_invariant(model_folder: Path, prompts: list[list[int]]) -> None:
    """Even near ties are the same alone, in a batch, and with prompts split into chunks."""
    model, prompts = load(model_folder, "bfloat16", "native"), prompts[:NUM_SLOW]
    together = generate(model, prompts, NUM_SLOW)
    assert generate(model, prompts[:NUM_ALONE], 1) == together[:NUM_ALONE]
    assert generate(model, prompts[::-1], 3, max_step_tokens=16)[::-1] == together


def next_tokens(
    model: Model, prompts: list[list[int]], answers: list[list[int]]
) -> list[list[int]]:
    """The most likely token at each position of the answers, teacher-forced."""
    said: list[list[int]] = [[] for _ in prompts]
    cache, sequences = model.make_kv_cache(0), [Sequence(prompt) for prompt in prompts]
    for sequence in sequences:
        cache.allocate(sequence)
    for position in range(max(map(len, answers))):
        running = [i for i, answer in enumerate(answers) if position < len(answer)]
        work = []
        for sequence in (sequences[i] for i in running):
            cache.ensure_capacity(sequence)
            work.append(ScheduledSequence(sequence, sequence.num_cached, len(sequence.token_ids)))
        best = model.head.best(model.forward(cache.make_batch(work)))
        for i, step, token in zip(running, work, best, strict=True):
            said[i].append(token)
            step.sequence.num_cached = step.stop
            step.sequence.token_ids.append(answers[i][position])
    return said
