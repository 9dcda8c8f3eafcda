"""Recorded decoding steps: when they are recorded, replayed and dropped, and when that fails."""

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_tools import Endless
from tape import Tape
from torch import Tensor

from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Model
from smolcli.engine.sequence import Sequence
from smolcli.engine.torch_ops.cuda_graphs import EAGER_STEPS, GraphedModel
from smolcli.engine.torch_ops.model import TorchModel
from smolcli.types import Sampling
from smolcli.weights.loader import load_model

NUM_TOKENS = 40
NUM_QUESTIONS = 30


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> TorchModel:
    model = load_model(tiny_folder, "float32")
    assert isinstance(model, TorchModel)
    return model


@pytest.fixture(scope="module")
def eager_answers(plain: TorchModel) -> list[list[int]]:
    return answers(plain, NUM_QUESTIONS)


def answers(model: Model, num_questions: int) -> list[list[int]]:
    """Answers of equal length to prompts that arrive one by one while the others run."""
    engine = Engine(Endless(model), num_questions, 64 << 20)
    sampling = Sampling(max_new_tokens=NUM_TOKENS)
    sequences = [Sequence([9 + i, 30, 31 + i], sampling) for i in range(num_questions)]
    for sequence in sequences:
        engine.add(sequence)
        engine.step()
        engine.step()
    while engine.has_work:
        engine.step()
    return [s.output_ids for s in sequences]


def test_a_step_is_recorded_after_a_few_eager_ones(plain: TorchModel) -> None:
    tape = Tape()
    assert answers(GraphedModel(plain, tape.record), 1) == answers(plain, 1)
    assert tape.num_replays == NUM_TOKENS - 1 - EAGER_STEPS, "the first token comes from the prompt"


def test_a_slab_that_grows_or_shrinks_is_recorded_again(
    plain: TorchModel, eager_answers: list[list[int]]
) -> None:
    tapes: list[Tape] = []

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tapes.append(Tape())
        return tapes[-1].record(compute)

    assert answers(GraphedModel(plain, record), NUM_QUESTIONS) == eager_answers
    assert len(tapes) > 2
    assert all(tape.num_replays for tape in tapes)


def test_decoding_continues_eagerly_if_recording_fails(
    plain: TorchModel, eager_answers: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[Any] = []

    def refuse(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tried.append(compute)
        raise RuntimeError("out of memory")

    with caplog.at_level(logging.WARNING):
        assert answers(GraphedModel(plain, refuse), NUM_QUESTIONS) == eager_answers
    assert len(tried) == len(caplog.records) == 1
    assert "slower: out of memory" in caplog.text


def test_the_inputs_of_a_graph_live_as_long_as_the_graph(plain: TorchModel) -> None:
    """A graph reads fixed addresses and keeps no tensor alive."""
    recorded: list[weakref.ref[Callable[[], Tensor]]] = []

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded.append(weakref.ref(compute))
        result = compute()

        def replay() -> Tensor:
            assert recorded[-1]() is not None
            return result

        return replay

    answers(GraphedModel(plain, record), 1)
    assert len(recorded) == 1


@pytest.mark.parametrize("asks", [lambda x: x.sum().item(), lambda x: x.nonzero(), torch.tensor])
def test_the_tape_rejects_what_a_graph_cannot_record(asks: Callable[[Any], Any]) -> None:
    """Therefore a step that no GPU could replay fails on the CPU as well."""
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        Tape().record(lambda: x * asks([1.0] if asks is torch.tensor else x))
