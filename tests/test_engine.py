"""The engine against transformers' `generate`, and its scheduling on a tiny random model."""

import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import KERNELS, WAYS, Endless, load

from smolcli.engine.engine import MOST_FAILED_STEPS, Engine
from smolcli.engine.interfaces import Batch, Head, Masks, Model
from smolcli.engine.sequence import Sequence
from smolcli.errors import BackendError, ModelError, PromptTooLong
from smolcli.types import FinishReason, Sampling
from smolcli.weights.loader import load_config

MEGABYTE = 1 << 20
SHAPES = {  # heads, kv heads, tied embeddings: SmolLM2's three sizes and an untied one, scaled down
    "135M": (9, 3, True),
    "360M": (15, 5, True),
    "1.7B": (8, 8, True),
    "untied": (4, 2, False),
}


def save_llama(folder: Path, shape: tuple[int, int, bool]) -> Any:
    """A random Llama of the shape, with norms that matter; returns transformers' model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kv_heads, is_tied = shape
    config = LlamaConfig(
        vocab_size=170,
        hidden_size=heads * 32,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        intermediate_size=heads * 48,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=is_tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=[2, 5],
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).float().eval()
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 2.0)
        model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=product(SHAPES, WAYS), ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model and ours, of the same weights."""
    shape, kernels = request.param
    folder = tmp_path_factory.mktemp("llama")
    theirs = save_llama(folder, SHAPES[shape])
    questions = prompts(14)
    lengths = [1 + 11 * i % 70 for i in range(len(questions))]
    return SimpleNamespace(
        theirs=theirs,
        ours=load(folder, torch.float32, kernels),
        questions=questions,
        answers=[
            reference(theirs, q, max_new_tokens=n) for q, n in zip(questions, lengths, strict=True)
        ],
        lengths=lengths,
    )


@pytest.fixture(scope="module", params=KERNELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder, SHAPES["135M"])
    return load(folder, torch.float32, request.param)


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    source = random.Random(3)
    return [
        [source.randrange(6, 160) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


def reference(theirs: Any, prompt: list[int], **options: Any) -> list[int]:
    """What transformers generates greedily."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = theirs.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=2, **options)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def generate(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    assert engine.kv_cache.num_sequences == 0, "every row and buffer is free again"
    assert engine.scheduler.reserved == 0
    return [s.output_ids for s in sequences]


def greedy(prompt: list[int], max_new_tokens: int = 40) -> Sequence:
    return Sequence(prompt, Sampling(max_new_tokens=max_new_tokens))


@pytest.mark.parametrize("max_batch_size", [1, 3, 16])
@pytest.mark.parametrize("max_step_tokens", [8, 256])
def test_greedy_equals_transformers(pair: Any, max_batch_size: int, max_step_tokens: int) -> None:
    """Token for token in float32: alone, in small and large batches, prompts whole or in pieces."""
    engine = Engine(pair.ours, max_batch_size, 64 * MEGABYTE, max_step_tokens=max_step_tokens)
    sequences = [greedy(q, n) for q, n in zip(pair.questions, pair.lengths, strict=True)]
    assert generate(engine, sequences) == pair.answers


def test_urgent_ones_between_others_change_no_token(pair: Any) -> None:
    """They come while others run and take steps of their own, so that a step has gaps."""
    engine = Engine(pair.ours, 16, 64 * MEGABYTE)
    sequences = [greedy(q, n) for q, n in zip(pair.questions, pair.lengths, strict=True)]
    for i, sequence in enumerate(sequences):
        sequence.is_interactive = i % 3 == 1
        engine.add(sequence)
        for _ in range(3):
            engine.step()
    assert generate(engine, []) == []
    assert [s.output_ids for s in sequences] == pair.answers


@pytest.mark.parametrize("max_step_tokens", [8, 256])
def test_a_known_beginning_changes_no_token(pair: Any, max_step_tokens: int) -> None:
    """Prompts that begin alike hit the prefix cache, and answer as transformers does."""
    system = list(range(20, 55))
    questions = [system + q[:20] for q in pair.questions[:6]]
    expected = [reference(pair.theirs, q, max_new_tokens=12) for q in questions]
    engine = Engine(
        pair.ours,
        4,
        64 * MEGABYTE,
        prefix_cache_bytes=4 * MEGABYTE,
        max_step_tokens=max_step_tokens,
    )
    for _ in range(2):
        assert generate(engine, [greedy(q, 12) for q in questions]) == expected
    prefixes = engine.kv_cache.prefix_cache
    assert prefixes.num_hit_tokens > prefixes.num_asked_tokens // 2


def test_the_prefix_cache_is_bounded_and_drops_the_oldest(model: Model) -> None:
    block = model.config.kv_cache_bytes(4, 4)
    engine = Engine(model, 2, 64 * MEGABYTE, prefix_cache_bytes=6 * block)
    hits = []
    for prompt in ([9] * 17, list(range(20, 37)), [9] * 17, list(range(60, 100)), [9] * 17):
        before = engine.kv_cache.prefix_cache.num_hit_tokens
        generate(engine, [greedy(prompt, 1)])
        hits.append(engine.kv_cache.prefix_cache.num_hit_tokens - before)
        assert engine.kv_cache.prefix_cache.num_bytes <= 6 * block
    assert hits[0] == hits[1] == hits[3] == hits[4] == 0


def test_every_end_of_sequence_id_ends(pair: Any) -> None:
    assert pair.ours.config.eos_ids == {2, 5}


def test_a_freed_slot_is_refilled_at_the_next_step(model: Model) -> None:
    """Two slots, one long answer and three short ones: the short ones pass through beside it."""
    engine = Engine(Endless(model), 2, 64 * MEGABYTE)
    shorts = [greedy([10 + i, 20], 5) for i in range(3)]
    generate(engine, [greedy([9, 8, 7], 60), *shorts])
    assert engine.num_steps == 60


def test_a_neighbours_content_never_changes_a_row(model: Model) -> None:
    """At equal shapes the hidden states of a row are the same bits whoever else is in the batch."""
    seen = []
    for other in (11, 97):
        recorder = Recorder(model)
        watched = greedy([31, 32, 33, 34], 12)
        neighbours = [greedy([other + i, other, 40 + i], 12) for i in range(6)]
        generate(Engine(recorder, 8, 64 * MEGABYTE), [watched, *neighbours])
        seen.append([hidden[0] for hidden in recorder.hidden])
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*seen, strict=True)
    )


class Recorder(Endless):
    """Keeps the hidden states."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.hidden: list[torch.Tensor] = []

    def forward(self, batch: Batch) -> torch.Tensor:
        self.hidden.append(hidden := super().forward(batch))
        return hidden


def test_sampling_depends_on_the_seed_alone(model: Model) -> None:
    hot = Sampling(max_new_tokens=20, temperature=1.3, top_k=50, top_p=0.9, seed=5)
    alone = generate(Engine(model, 1, 64 * MEGABYTE), [Sequence([9, 9], hot)])[0]
    crowd = [Sequence(p, hot) for p in prompts(6)]
    together = generate(Engine(model, 8, 64 * MEGABYTE), [*crowd, Sequence([9, 9], hot)])[-1]
    other = Sampling(max_new_tokens=20, temperature=1.3, top_k=50, top_p=0.9, seed=6)
    assert alone == together
    assert alone != generate(Engine(model, 1, 64 * MEGABYTE), [Sequence([9, 9], other)])[0]


def test_a_step_that_is_computed_again_draws_as_before(model: Model) -> None:
    """The plain rows of the third step fail after the others have drawn."""
    hot = Sampling(max_new_tokens=20, temperature=1.3, seed=5)
    alone = generate(Engine(Endless(model), 4, 64 * MEGABYTE), [Sequence([9, 9], hot)])
    tight = Endless(model)
    tight.head = FailsOnce(model.head, 3)
    drawn, plain = Sequence([9, 9], hot), greedy([30, 31], 20)
    generate(Engine(tight, 4, 64 * MEGABYTE), [drawn, plain])
    assert [drawn.output_ids] == alone
    assert plain.num_output == 20


class FailsOnce:
    """A head whose n-th look for the best tokens fails."""

    def __init__(self, head: Head, number: int) -> None:
        self.logits, self.refine = head.logits, head.refine
        self._head, self._left = head, number

    def best(self, x: torch.Tensor, masks: Masks = ()) -> list[int]:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("out of memory")
        return self._head.best(x, masks)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(pair: Any, penalty: float) -> None:
    prompt = [9, 30, 30, 31]
    expected = reference(pair.theirs, prompt, max_new_tokens=25, repetition_penalty=penalty)
    settings_ = Sampling(max_new_tokens=25, repetition_penalty=penalty)
    engine = Engine(pair.ours, 4, 64 * MEGABYTE)
    assert generate(engine, [Sequence(prompt, settings_)])[0] == expected


def test_a_prompt_without_room_is_refused_with_its_counts(model: Model) -> None:
    engine = Engine(model, 2, 64 * MEGABYTE)
    with pytest.raises(PromptTooLong, match="512 tokens, but the maximum context length is 512"):
        engine.add(greedy([9] * 512))
    last = greedy([9] * 511, 50)
    generate(engine, [last])
    assert last.num_output == 1


def test_a_smaller_room_ends_as_length(model: Model) -> None:
    sequence = greedy([9] * 500, 10**30)
    generate(Engine(Endless(model), 2, 64 * MEGABYTE), [sequence])
    assert (sequence.num_output, sequence.finish_reason) == (12, FinishReason.LENGTH)


def test_the_cache_is_bounded(model: Model) -> None:
    """Sequences wait for memory, however many slots there are; all are answered."""
    per_sequence = model.config.kv_cache_bytes(128, 4)
    engine = Engine(model, 16, 3 * per_sequence)
    for prompt in prompts(10, 60):
        engine.add(greedy(prompt + [9] * 40, 28))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.scheduler.reserved)
    assert 0 < most <= 3 * per_sequence
    with pytest.raises(PromptTooLong):
        Engine(model, 1, per_sequence).add(greedy([9] * 128))


class Faulty(Endless):
    """Fails whenever a token of `poison` is in the batch."""

    poison: frozenset[int] = frozenset()

    def forward(self, batch: Batch) -> torch.Tensor:
        if self.poison & set(batch.token_ids.tolist()):
            raise RuntimeError("out of memory")
        return super().forward(batch)


@given(culprits=st.sets(st.integers(0, 8), max_size=4))
@settings(max_examples=12, deadline=None)
def test_a_failing_step_is_narrowed_down_to_its_culprits(model: Model, culprits: set[int]) -> None:
    """The others are answered, and with the same tokens as without the culprits."""
    questions = [[20 + i, 30, 31] for i in range(9)]
    faulty = Faulty(model)
    expected = generate(Engine(model, 9, 64 * MEGABYTE), [greedy(q, 6) for q in questions])
    used = {t for answer in expected for t in answer}
    poison = {100 + i for i in culprits} - used
    for i in culprits:
        questions[i] = [100 + i, *questions[i]]
    faulty.poison = frozenset(poison)
    sequences = [greedy(q, 6) for q in questions]
    generate(Engine(faulty, 9, 64 * MEGABYTE), sequences)
    for i, sequence in enumerate(sequences):
        if i in culprits and 100 + i in poison:
            assert "out of memory" in str(sequence.error)
        elif i not in culprits:
            assert sequence.output_ids == expected[i]


def test_an_engine_that_always_fails_is_gone(model: Model) -> None:
    faulty = Faulty(model)
    faulty.poison = frozenset(range(160))
    engine = Engine(faulty, 4, 64 * MEGABYTE)
    engine.add(greedy([9, 9]))
    engine.add(greedy([8, 8]))
    with pytest.raises(BackendError, match="out of memory"):
        engine.step()


def test_an_engine_whose_steps_fail_one_by_one_is_gone_in_the_end(model: Model) -> None:
    faulty = Faulty(model)
    faulty.poison = frozenset({9})
    engine = Engine(faulty, 4, 64 * MEGABYTE)
    for _ in range(MOST_FAILED_STEPS - 1):
        assert generate(engine, [greedy([9, 9])]) == [[]]
    assert generate(engine, [greedy([8, 8], 1)]) != [[]]
    for _ in range(MOST_FAILED_STEPS - 1):
        generate(engine, [greedy([9, 9])])
    with pytest.raises(BackendError, match="out of memory"):
        generate(engine, [greedy([9, 9])])


def test_stopping_frees_everything_at_once(model: Model) -> None:
    """The row that moves into a freed place was once written to outside inference mode."""
    engine = Engine(Endless(model), 3, 64 * MEGABYTE)
    sequences = [greedy(p) for p in prompts(5)]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(3):
        engine.step()
    for sequence in sequences:
        engine.stop(sequence)
    assert not engine.has_work
    assert engine.kv_cache.num_sequences == 0


def test_another_architecture_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        load_config(tmp_path)
