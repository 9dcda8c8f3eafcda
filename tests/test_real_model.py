"""The engine on the real SmolLM2-135M-Instruct against transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smolcli.chat import Chat
from smolcli.engine.attention import PromptSpan
from smolcli.engine.engine import Engine
from smolcli.engine.model import Batch, LlamaModel
from smolcli.engine.sequence import Sequence
from smolcli.models.load import load_model
from smolcli.records import Message, Sampling

pytestmark = pytest.mark.model

QUESTIONS = Path(__file__).parents[1] / "smolcli" / "bench" / "reference.jsonl"
NUM_QUESTIONS = 20
NUM_TOKENS = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prompts(model_folder: Path) -> list[list[int]]:
    chat = Chat.load(model_folder)
    lines = QUESTIONS.read_text("utf-8").splitlines()[:NUM_QUESTIONS]
    return [chat.encode([Message("user", json.loads(line)["user_prompt"])]) for line in lines]


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> LlamaModel:
    return load_model(model_folder, torch.float32, CPU)


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


def generate(model: LlamaModel, prompts: list[list[int]], max_batch_size: int) -> list[list[int]]:
    engine = Engine(model, max_batch_size, 1 << 30)
    sequences = [Sequence(p, Sampling(max_new_tokens=NUM_TOKENS)) for p in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    return [s.output_ids for s in sequences]


@pytest.mark.parametrize("max_batch_size", [NUM_QUESTIONS, 1])
def test_float32_equals_transformers(
    ours: LlamaModel, prompts: list[list[int]], expected: list[list[int]], max_batch_size: int
) -> None:
    """Token for token, as one batch and one by one."""
    assert generate(ours, prompts, max_batch_size) == expected


def test_bfloat16_nearly_always_agrees(
    model_folder: Path,
    ours: LlamaModel,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    """Teacher-forced on float32's answers, the most likely token is the same 97 % of the time."""
    half = load_model(model_folder, torch.bfloat16, CPU)
    same = [
        token == forced
        for prompt, answer in zip(prompts, expected, strict=True)
        for token, forced in zip(next_tokens(half, prompt, answer), answer, strict=True)
    ]
    assert sum(same) / len(same) >= 0.97


@torch.inference_mode()
def next_tokens(model: LlamaModel, prompt: list[int], answer: list[int]) -> list[int]:
    """What the model would say at each token of the answer."""
    token_ids = (prompt + answer)[:-1]
    config, length = model.config, len(token_ids)
    keys = torch.empty(
        config.num_layers, config.num_kv_heads, length, config.head_dim, dtype=model.dtype
    )
    span = PromptSpan(keys, torch.empty_like(keys), 0, length)
    last_rows = torch.arange(len(prompt) - 1, length)
    batch = Batch(torch.tensor(token_ids), torch.arange(length), [span], last_rows)
    return model.head.best(model.forward(batch))
