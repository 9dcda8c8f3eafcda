"""Drawn tokens against transformers' logits processors, and their independence of the batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolcli.engine.sampler import NUCLEUS, choose, choose_scored
from smolcli.engine.sequence import Sequence
from smolcli.engine.torch_ops.head import TorchHead
from smolcli.types import Sampling

VOCAB = 1000
NUM_DRAWS = 4000

SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.6},
    {"temperature": 1.2, "top_k": 10**30},
    {"temperature": 5.0, "top_p": 0.999},  # flatter than NUCLEUS tokens hold
]


def expected_probs(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.tensor([[0]])
    scores = TemperatureLogitsWarper(options["temperature"])(ids, logits[None])
    if "top_k" in options:
        scores = TopKLogitsWarper(min(options["top_k"], VOCAB))(ids, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(ids, scores)
    return scores.softmax(-1)[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_draws_follow_transformers_distribution(
    logits: torch.Tensor, options: dict[str, Any]
) -> None:
    sequences = [Sequence([1], Sampling(**options, seed=i)) for i in range(NUM_DRAWS)]
    tokens = choose_scored(logits.repeat(NUM_DRAWS, 1), sequences)
    expected = expected_probs(logits, options)
    seen = torch.bincount(torch.tensor(tokens), minlength=VOCAB) / NUM_DRAWS
    assert not seen[expected == 0].any(), "nothing outside top-k and top-p is ever drawn"
    assert (seen - expected).abs().sum() / 2 < (0.05 if options.get("top_k") == 5 else 0.25)


def test_the_nucleus_of_a_flat_distribution_is_whole() -> None:
    """More tokens than the short list holds: all of them are drawn from."""
    flat = torch.zeros(600, 4 * NUCLEUS)
    sequences = [Sequence([1], Sampling(temperature=1.0, top_p=0.9, seed=i)) for i in range(600)]
    assert len(set(choose_scored(flat, sequences))) > NUCLEUS * 0.8


@given(st.lists(st.integers(0, len(SETTINGS) - 1), max_size=6), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_neighbours_change_no_draw(others: list[int], index: int) -> None:
    logits = torch.randn(len(others) + 1, VOCAB, generator=torch.Generator().manual_seed(1))
    logits = logits.bfloat16().float()  # with ties

    def watched() -> Sequence:
        return Sequence([1], Sampling(**SETTINGS[index], seed=7))  # type: ignore[arg-type]

    crowd = [Sequence([2], Sampling(**SETTINGS[i], seed=i)) for i in others]  # type: ignore[arg-type]
    alone = choose_scored(logits[:1].clone(), [watched()])[0]
    assert choose_scored(logits.clone(), [watched(), *crowd])[0] == alone


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 100.0])
def test_extreme_temperatures_are_fine(logits: torch.Tensor, temperature: float) -> None:
    sequence = Sequence([1], Sampling(temperature=temperature, seed=1))
    token = choose_scored(logits[None].clone(), [sequence])[0]
    assert 0 <= token < VOCAB
    if temperature < 1:
        assert token == logits.argmax()


class Only:
    """A constraint that always allows the same tokens."""

    is_complete = is_over = False

    def __init__(self, *token_ids: int) -> None:
        bits = sum(1 << token_id for token_id in token_ids)
        self._mask = bits.to_bytes((VOCAB + 31) // 32 * 4, "little")

    def mask(self) -> bytes:
        return self._mask

    def accept(self, token_id: int) -> None:
        pass


@pytest.mark.parametrize("options", [{}, *SETTINGS, {"repetition_penalty": 3.0}], ids=str)
def test_only_what_a_constraint_allows_is_chosen(options: dict[str, Any]) -> None:
    """As from a vocabulary of nothing else; rows without a constraint choose as ever."""
    head = TorchHead(torch.randn(VOCAB, 8), torch.ones(8), 1e-6)
    hidden, allowed = torch.randn(40, 8), [3, 8, 500, VOCAB - 1]
    held = [
        Sequence([1], Sampling(**options, seed=i), constraint=Only(*allowed)) for i in range(20)
    ]
    free, again = (
        [Sequence([1], Sampling(**options, seed=i)) for i in range(20)] for _ in range(2)
    )
    tokens = choose(head, hidden, held + free)
    assert set(tokens[:20]) <= set(allowed)
    assert tokens[20:] == choose(head, hidden[20:], again)
    if not options:
        best = head.logits(hidden[:20])[:, allowed].argmax(-1).tolist()
        assert tokens[:20] == [allowed[i] for i in best]


def test_the_likeliest_are_refined_to_float32() -> None:
    """The others, and what is forbidden, stay as they are."""
    weight, norm = torch.randn(VOCAB, 64).bfloat16(), torch.rand(64)
    head, exact = TorchHead(weight, norm, 1e-6), TorchHead(weight.float(), norm, 1e-6)
    hidden = torch.randn(5, 64).bfloat16()
    logits = head.logits(hidden)
    logits[:, :900] = -torch.inf
    rough, refined = logits.clone(), logits.clone()
    head.refine(hidden, refined, 64)
    likeliest = rough.topk(64).indices
    expected = exact.logits(hidden.float()).gather(1, likeliest)
    torch.testing.assert_close(refined.gather(1, likeliest), expected, rtol=0, atol=1e-3)
    assert torch.equal(refined.scatter(1, likeliest, 0), rough.scatter(1, likeliest, 0))
    head.refine(hidden, logits, 200)
    assert logits[:, :900].isinf().all()
