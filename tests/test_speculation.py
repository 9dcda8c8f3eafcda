"""Speculation: drafts are looked up, and whatever they contain, answers stay the same."""

import random
from pathlib import Path
from typing import Any

import pytest
from kernel_tools import Endless, load

from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Head, Hidden, Masks, Model
from smolcli.engine.sequence import Sequence
from smolcli.engine.speculation import MAX_DRAFT_TOKENS, NgramIndex, Speculation, draft_length
from smolcli.types import FinishReason, Sampling

MEGABYTE = 1 << 20
Outcome = tuple[list[int], FinishReason | None, list[Any]]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load(tiny_folder, "float32", "native")


class Guesses(Speculation):
    """Drafts of random lengths from known answers, with some wrong tokens.

    Args:
        answers: what each prompt is answered with.
        seed: seed of the lengths and the wrong tokens.
        wrong: the probability that a drafted token is wrong.
    """

    def __init__(self, answers: dict[tuple[int, ...], list[int]], seed: int, wrong: float) -> None:
        super().__init__()
        self._answers = answers
        self._random = random.Random(seed)
        self._wrong = wrong

    def drafts(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        drafts = [self._draft(sequence) for sequence in sequences]
        self.num_drafted += sum(map(len, drafts))
        return drafts

    def _draft(self, sequence: Sequence) -> tuple[int, ...]:
        room = sequence.max_tokens - len(sequence.token_ids) - 1
        if not sequence.takes_best:
            return ()
        answer = self._answers[tuple(sequence.prompt_ids)] + [7] * MAX_DRAFT_TOKENS
        num_tokens = self._random.randint(0, min(MAX_DRAFT_TOKENS, room))
        draft = answer[sequence.num_output :][:num_tokens]
        return tuple(9 if self._random.random() < self._wrong else token for token in draft)


def generate(engine: Engine, sequences: list[Sequence]) -> list[Outcome]:
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        before = [s.num_output for s in sequences]
        advanced = engine.step()
        grown = [s.num_output - n for s, n in zip(sequences, before, strict=True)]
        assert grown == [int(s in advanced) for s in sequences], "one token per step and sequence"
    assert engine.kv_cache.num_sequences == 0
    return [(s.output_ids, s.finish_reason, s.logprobs) for s in sequences]


def mixed_sequences() -> list[Sequence]:
    """Answers of all lengths: greedy, with log probabilities or end tokens, sampled, filtered."""
    source = random.Random(4)
    prompts = [[source.randrange(10, 300) for _ in range(3 + 7 * i)] for i in range(8)]
    settings = [
        Sampling(max_new_tokens=60),
        Sampling(max_new_tokens=7),
        Sampling(max_new_tokens=1),
        Sampling(max_new_tokens=40, stop_token_ids=tuple(range(0, 384, 5))),
        Sampling(max_new_tokens=30, temperature=1.0, seed=3),
        Sampling(max_new_tokens=30, repetition_penalty=1.3),
        Sampling(max_new_tokens=30, min_tokens=30),
        Sampling(max_new_tokens=50, ignore_eos=True),
    ]
    sequences = [Sequence(p, s) for p, s in zip(prompts, settings, strict=True)]
    long = [source.randrange(10, 300) for _ in range(490)]
    scored = Sequence(prompts[0] + [11], Sampling(max_new_tokens=35), top_logprobs=2)
    return [*sequences, scored, Sequence(long, Sampling(max_new_tokens=100))]


@pytest.fixture(scope="module")
def expected(model: Model) -> list[Outcome]:
    return generate(Engine(model, 16, 64 * MEGABYTE), mixed_sequences())


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("max_batch_size", [1, 16])
def test_drafts_of_any_length_change_no_answer(
    model: Model, expected: list[Outcome], max_batch_size: int, wrong: float
) -> None:
    """End tokens, token limits and the end of the context come inside of drafts."""
    sequences = mixed_sequences()
    answers = {tuple(s.prompt_ids): e[0] for s, e in zip(sequences, expected, strict=True)}
    speculation = Guesses(answers, seed=max_batch_size, wrong=wrong)
    engine = Engine(model, max_batch_size, 64 * MEGABYTE, 1 * MEGABYTE, 256, speculation)
    assert generate(engine, sequences) == expected
    assert 0 < speculation.num_accepted <= speculation.num_drafted
    assert {reason for _, reason, _ in expected} == {FinishReason.STOP, FinishReason.LENGTH}
    assert len(sequences[-1].token_ids) == model.config.max_positions


class Stammer:
    """A head that knows three tokens only, so that answers repeat themselves."""

    def __init__(self, head: Head) -> None:
        self.logits = head.logits

    def best(self, hidden: Hidden, masks: Masks = ()) -> list[int]:
        return [10 + int(row[10:13].argmax()) for row in self.logits(hidden)]


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_prompt_lookup_saves_steps_and_changes_no_answer(model: Model, num_sequences: int) -> None:
    def sequences() -> list[Sequence]:
        return [Sequence([20 + i, 30], Sampling(max_new_tokens=40)) for i in range(num_sequences)]

    stammering = Endless(model)
    stammering.head = Stammer(model.head)
    plain = Engine(stammering, 32, 64 * MEGABYTE)
    drafting = Engine(stammering, 32, 64 * MEGABYTE, speculation=Speculation())
    assert generate(plain, sequences()) == generate(drafting, sequences())
    is_alone = num_sequences == 1
    assert (drafting.num_steps < plain.num_steps) == is_alone
    assert drafting.speculation is not None
    assert (drafting.speculation.num_accepted > 0) == is_alone


def test_a_stopped_sequence_leaves_nothing_behind(model: Model, expected: list[Outcome]) -> None:
    """A query is cancelled while tokens of it are verified but not delivered."""
    cancelled, other = mixed_sequences()[0], mixed_sequences()[7]
    answers = {tuple(cancelled.prompt_ids): expected[0][0], tuple(other.prompt_ids): expected[7][0]}
    engine = Engine(model, 4, 64 * MEGABYTE, speculation=Guesses(answers, 1, wrong=0.0))
    engine.add(cancelled)
    while len(cancelled.verified) < 2:
        engine.step()
    engine.stop(cancelled)
    assert not engine.has_work
    assert generate(engine, [other]) == [expected[7]]


class Narrow:
    """A head that fails for more than one row, as if memory ran out."""

    def __init__(self, head: Head) -> None:
        self.logits = head.logits
        self.num_failures = 0
        self._head = head

    def best(self, hidden: Hidden, masks: Masks = ()) -> list[int]:
        if len(hidden) > 1:
            self.num_failures += 1
            raise RuntimeError("out of memory")
        return self._head.best(hidden, masks)


def test_a_step_that_fails_with_drafts_is_repeated_without(
    model: Model, expected: list[Outcome]
) -> None:
    sequences = [mixed_sequences()[i] for i in (0, 7)]
    answers = {tuple(s.prompt_ids): expected[i][0] for s, i in zip(sequences, (0, 7), strict=True)}
    failing = Endless(model)
    failing.config, failing.head = model.config, (narrow := Narrow(model.head))
    engine = Engine(failing, 4, 64 * MEGABYTE, speculation=Guesses(answers, 1, wrong=0.2))
    assert generate(engine, sequences) == [expected[0], expected[7]]
    assert narrow.num_failures > 10


def indexed(*token_ids: list[int]) -> NgramIndex:
    index = NgramIndex()
    for ids in token_ids:
        index.add(ids, 0)
    return index


def guessed(index: NgramIndex, token_ids: list[int], num_tokens: int) -> list[int]:
    return [guess.token for guess in index.guesses(token_ids, num_tokens)]


def test_the_longest_match_is_drafted() -> None:
    token_ids = [1, 2, 3, 4, 9, 3, 5, 1, 2, 3]
    assert guessed(indexed(token_ids), token_ids, 5) == [4, 9, 3, 5, 1]


def test_a_draft_that_reaches_the_newest_token_repeats() -> None:
    token_ids = [8, 6, 7, 6, 7]
    assert guessed(indexed(token_ids), token_ids, 5) == [6, 7, 6, 7, 6]


def test_nothing_is_drafted_without_a_match() -> None:
    assert guessed(indexed([1, 2, 3, 4]), [1, 2, 3, 4], 3) == []


def test_what_followed_last_is_drafted_also_from_other_sequences() -> None:
    index = indexed([1, 2, 3], [9, 1, 2, 4, 5])
    assert guessed(index, [7, 8, 1, 2], 3) == [4, 5]


def test_the_index_forgets_the_oldest_ngrams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolcli.engine.speculation.MAX_NGRAMS", 40)
    index = indexed([1, 2, 3], *([10 * i, 10 * i + 1, 10 * i + 2] for i in range(1, 30)))
    assert guessed(index, [1, 2], 1) == []
    assert guessed(index, [280, 281], 1) == [282]


def test_an_answer_is_drafted_from_an_equal_one_before(model: Model) -> None:
    """The second of two equal prompts needs fewer steps, also after a batch in between."""
    engine = Engine(model, 4, 64 * MEGABYTE, speculation=Speculation())

    def num_steps(*prompts: int) -> int:
        before = engine.num_steps
        sampling = Sampling(max_new_tokens=32, ignore_eos=True)
        generate(engine, [Sequence([prompt, 31, 32], sampling) for prompt in prompts])
        return engine.num_steps - before

    first = num_steps(20)
    num_steps(21, 22)
    assert num_steps(20) < first / 2


def test_draft_lengths_follow_the_accuracy_of_earlier_drafts() -> None:
    """Right drafts grow to the maximum; wrong ones end, and return once guesses are right again."""
    speculation = Speculation()
    sequence = Sequence([1, 2, 3, 4] * 3, Sampling(max_new_tokens=500))

    def draft() -> tuple[int, ...]:
        return speculation.drafts([sequence])[0]

    lengths = []
    for _ in range(30):
        lengths.append(len(drafted := draft()))
        sequence.token_ids += drafted
        sequence.token_ids.append(sequence.token_ids[-4])
    assert lengths == sorted(lengths)
    assert lengths[-1] == MAX_DRAFT_TOKENS
    for other in range(40):
        draft()
        sequence.token_ids += [100 + other, 1, 2, 3]  # something new always follows 1, 2, 3
    assert draft() == ()
    for _ in range(20):
        sequence.token_ids += [5, 1, 2, 3]
        drafted = draft()
    assert drafted[:4] == (5, 1, 2, 3)


def test_longer_drafts_need_better_guesses() -> None:
    lengths = [draft_length([percent / 100] * MAX_DRAFT_TOKENS) for percent in range(101)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[9], lengths[12], lengths[100]) == (0, 0, 1, MAX_DRAFT_TOKENS)
    assert draft_length([0.05, 1.0, 1.0, 1.0]) == 0
    assert draft_length([0.9, 0.05, 1.0, 1.0]) == 1


def test_a_draft_leaves_room_for_the_token_after_it() -> None:
    sequence = Sequence([1, 2] * 20, Sampling(max_new_tokens=2))
    sequence.token_ids.append(1)
    assert Speculation().drafts([sequence]) == [()]
