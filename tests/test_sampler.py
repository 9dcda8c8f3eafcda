"""Sampled tokens against transformers' logits processors, and their independence of the batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolcli.engine.interfaces import Array
from smolcli.engine.sampler import NUCLEUS_TOKENS, sample, sample_token
from smolcli.engine.sequence import Sequence
from smolcli.engine.torch_ops.model import TorchHead
from smolcli.types import Sampling

VOCAB = 1000
NUM_DRAWS = 2500
MAX_CHI_SQUARE_SIGMAS = 4  # 3 in 100,000 for a correct sampler, and the seeds are fixed

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.6},
    {"temperature": 1.2, "top_k": 10**30},
    {"temperature": 5.0, "top_p": 0.999},  # flatter than NUCLEUS_TOKENS can hold
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 2.0, "min_p": 0.02, "top_k": 30, "top_p": 0.9},
]


def expected_probs(logits: Array, options: dict[str, Any]) -> Array:
    """By transformers' processors, in vLLM's order: min-p comes before top-k and top-p."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids: Any = torch.tensor([[0]])
    scores = TemperatureLogitsWarper(options["temperature"])(ids, torch.tensor(logits)[None])
    if "min_p" in options:
        scores = MinPLogitsWarper(options["min_p"])(ids, scores)
    if "top_k" in options:
        scores = TopKLogitsWarper(min(options["top_k"], VOCAB))(ids, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(ids, scores)
    probs: Array = scores.double().softmax(-1)[0].numpy()
    return probs


def chi_square_sigmas(counts: Array, expected: Array) -> float:
    """Pearson's statistic in standard deviations from its mean; rare tokens share one bin."""
    is_rare = expected < 5
    bins = [(counts[i], expected[i]) for i in np.flatnonzero(~is_rare)]
    if expected[is_rare].sum() >= 5:
        bins.append((counts[is_rare].sum(), expected[is_rare].sum()))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in bins)
    dof = len(bins) - 1
    return float((statistic - dof) / math.sqrt(2 * dof))


def draw_counts(logits: Array, options: dict[str, Any]) -> Array:
    sequences = [Sequence([1], Sampling(**options, seed=seed)) for seed in range(NUM_DRAWS)]
    tokens = [sample_token(logits.copy(), sequence) for sequence in sequences]
    return np.bincount(tokens, minlength=VOCAB)


@pytest.fixture
def logits() -> Array:
    return np.random.default_rng(0).normal(0, 3, VOCAB).astype(np.float32)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_samples_follow_the_distribution_of_transformers(
    logits: Array, options: dict[str, Any]
) -> None:
    expected = expected_probs(logits, options) * NUM_DRAWS
    counts = draw_counts(logits, options)
    assert not counts[expected == 0].any(), "a token outside top-k or top-p was sampled"
    assert chi_square_sigmas(counts, expected) < MAX_CHI_SQUARE_SIGMAS


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_statistic_detects_a_temperature_that_is_off_by_30_percent(
    logits: Array, options: dict[str, Any]
) -> None:
    """A bound on the total variation distance once accepted such temperatures."""
    wrong = options | {"temperature": options["temperature"] * 1.3}
    expected = expected_probs(logits, options) * NUM_DRAWS
    counts = draw_counts(logits, wrong)
    is_wrong = bool(counts[expected == 0].any())
    assert is_wrong or chi_square_sigmas(counts, expected) > MAX_CHI_SQUARE_SIGMAS


def test_top_p_of_a_flat_distribution_keeps_every_token_it_should() -> None:
    flat = np.zeros(4 * NUCLEUS_TOKENS, np.float32)
    sequences = [Sequence([1], Sampling(temperature=1.0, top_p=0.9, seed=i)) for i in range(600)]
    assert len({sample_token(flat.copy(), s) for s in sequences}) > NUCLEUS_TOKENS * 0.8


def test_negative_seeds_differ_from_their_absolute_values(logits: Array) -> None:
    """Python's generator takes the absolute value of its seed."""
    draws = [
        [Sequence([1], Sampling(seed=sign * seed)).draw_uniform() for seed in range(1, 50)]
        for sign in (1, -1)
    ]
    assert not set(draws[0]) & set(draws[1])


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids() -> None:
    logits = np.zeros(VOCAB, np.float32)
    sequences = [Sequence([1], Sampling(temperature=1.0, top_k=3, seed=i)) for i in range(50)]
    assert {sample_token(logits.copy(), s) for s in sequences} == {0, 1, 2}


@given(st.lists(st.integers(0, len(SETTINGS) - 1), max_size=6), st.integers(0, 5))
@settings(max_examples=30)
def test_the_rest_of_the_batch_changes_no_sample(others: list[int], index: int) -> None:
    """With ties among the logits."""
    head, hidden = random_head(len(others) + 1)

    def watched() -> Sequence:
        return Sequence([1], Sampling(**SETTINGS[index], seed=7))

    others_ = [Sequence([2], Sampling(**SETTINGS[i], seed=i)) for i in others]
    [alone] = sample(head, hidden[:1], [watched()])
    assert sample(head, hidden, [watched(), *others_])[0] == alone


class FixedHead:
    """A head whose hidden states are the logits."""

    def logits(self, hidden: Array) -> Array:
        return hidden.copy()

    def best(self, hidden: Array, masks: Any = ()) -> list[int]:
        raise NotImplementedError


def random_head(num_rows: int) -> tuple[FixedHead, Array]:
    rows = np.random.default_rng(1).normal(0, 1, (num_rows, VOCAB))
    return FixedHead(), rows.round(1).astype(np.float32)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 100.0])
def test_extreme_temperatures_are_fine(logits: Array, temperature: float) -> None:
    token = sample_token(logits.copy(), Sequence([1], Sampling(temperature=temperature, seed=1)))
    assert 0 <= token < VOCAB
    if temperature < 1:
        assert token == logits.argmax()


EXTREMES: list[dict[str, Any]] = [
    {"repetition_penalty": 5e-324},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e-38},
    {"repetition_penalty": 100.0},
    {"temperature": 5e-324},
    {"temperature": 100.0},
    {"top_p": 5e-324},
    {"top_p": 5e-324, "top_k": 3},
    {"min_p": 5e-324},
    {"min_p": 1.0},
    {"presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"logit_bias": ((3, 100.0), (4, -100.0), (5, 5e-324))},
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_parameters_at_their_limits_give_a_token(
    logits: Array, extreme: dict[str, Any], is_greedy: bool
) -> None:
    """A tiny repetition penalty overflowed the logits, and the query failed as `internal`."""
    logits[:4] = -30.0, 0.0, 30.0, 1e-30
    options = ({} if is_greedy else {"temperature": 1.0, "seed": 1}) | extreme
    sequence = Sequence([0, 1, 2, 3], Sampling(**options))
    for _ in range(5):
        token = sample_token(logits.copy(), sequence)
        assert 0 <= token < VOCAB
        sequence.append(token, frozenset())
    if extreme.get("repetition_penalty", 1.0) < 1:
        assert sequence.output_ids == [2] * 5


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(logits: Array, fault: float) -> None:
    logits[7] = fault
    with pytest.raises(FloatingPointError):
        sample_token(logits, Sequence([1], Sampling(temperature=1.0)))


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
def test_only_tokens_that_a_constraint_allows_are_chosen(options: dict[str, Any]) -> None:
    """Rows without a constraint are not affected by those that have one."""
    generator = torch.Generator().manual_seed(0)
    head = TorchHead(torch.randn(VOCAB, 8, generator=generator), torch.ones(8), 1e-6)
    hidden, allowed = torch.randn(40, 8, generator=generator), [3, 8, 500, VOCAB - 1]
    held = [
        Sequence([1], Sampling(**options, seed=i), constraint=Only(*allowed)) for i in range(20)
    ]
    free, again = (
        [Sequence([1], Sampling(**options, seed=i)) for i in range(20)] for _ in range(2)
    )
    tokens = [token for token, _ in sample(head, hidden, held + free)]
    assert set(tokens[:20]) <= set(allowed)
    assert tokens[20:] == [token for token, _ in sample(head, hidden[20:], again)]
    if not options:
        best = head.logits(hidden[:20])[:, allowed].argmax(-1).tolist()
        assert tokens[:20] == [allowed[i] for i in best]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"repetition_penalty": 3.0}])
def test_log_probabilities_are_those_of_the_model_among_the_allowed_tokens(
    options: dict[str, Any],
) -> None:
    """Before penalty, temperature, top-k and top-p; forbidden tokens are never alternatives."""
    head = TorchHead(torch.eye(VOCAB)[:, :8].contiguous(), torch.ones(8), 1e-6)
    hidden, allowed = torch.arange(8.0)[None], [2, 5, 7]
    sampling = Sampling(**options)
    sequence = Sequence([5], sampling, constraint=Only(*allowed), top_logprobs=5)
    [(token, logprob)] = sample(head, hidden, [sequence])
    assert logprob is not None
    expected = torch.tensor(head.logits(hidden)[0, allowed]).double().log_softmax(-1).tolist()
    by_token = dict(zip(allowed, expected, strict=True))
    assert logprob.token_id == token
    assert logprob.logprob == pytest.approx(by_token[token], abs=1e-6)
    assert [i for i, _ in logprob.alternatives] == [7, 5, 2]
    assert dict(logprob.alternatives) == pytest.approx(by_token, abs=1e-6)


def test_logits_of_a_bfloat16_model_are_not_rounded() -> None:
    weight, norm = torch.randn(VOCAB, 64).bfloat16(), torch.rand(64)
    hidden = torch.randn(5, 64).bfloat16()
    logits = TorchHead(weight, norm, 1e-6).logits(hidden)
    exact = TorchHead(weight.float(), norm, 1e-6).logits(hidden.float())
    np.testing.assert_array_equal(logits, exact)
    assert logits.dtype == np.float32
