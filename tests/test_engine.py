"""The engine against transformers' `generate`, and its scheduling on a tiny random model."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import GPU, KERNELS, Endless, load

from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Batch, Head, Hidden, Masks, Model
from smolcli.engine.prefix_cache import BLOCK_TOKENS
from smolcli.engine.sequence import Sequence
from smolcli.engine.speculation import Speculation
from smolcli.errors import BackendError, ModelError, PromptTooLong, QueryError
from smolcli.types import FinishReason, Sampling
from smolcli.weights.loader import load_config

MEGABYTE = 1 << 20
SHAPES = {  # heads, kv heads, tied embeddings: SmolLM2's three sizes and an untied one, scaled down
    "135M": (9, 3, True),
    "360M": (15, 5, True),
    "1.7B": (8, 8, True),
    "untied": (4, 2, False),
}
PAIRS = [  # torch's operators depend on the ratio of heads, which 135M and 360M share
    *(("native", shape) for shape in SHAPES),
    *(("torch", shape) for shape in SHAPES if shape != "360M"),
    ("graphs", "135M"),  # recording steps does not depend on the shape
    *(("cuda", shape) for shape in SHAPES if GPU),
]


def save_llama(folder: Path, shape: tuple[int, int, bool]) -> Any:
    """Save a random Llama with norm weights other than 1; returns transformers' model."""
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
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=is_tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=[2, 5],
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: Any = LlamaForCausalLM(config)
        model.float().eval()
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 2.0)
        model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread does not speed up tiny models, and slows them down on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What transformers computes with a shape, once, which every way to compute must equal."""

    @cache
    def compute(shape: str) -> Any:
        folder = tmp_path_factory.mktemp("llama")
        model = save_llama(folder, SHAPES[shape])
        questions = prompts(14)
        lengths = [1 + 11 * i % 40 for i in range(len(questions))]
        prefixed = [[*range(20, 55), *question[:20]] for question in questions[:6]]
        repeated = [9, 30, 30, 31]
        with torch.no_grad():
            logprobs = [model(torch.tensor([q])).logits[0].log_softmax(-1) for q in questions]
        return SimpleNamespace(
            folder=folder,
            questions=questions,
            lengths=lengths,
            answers=references(model, questions, lengths),
            logprobs=logprobs,
            prefixed=prefixed,
            prefixed_answers=references(model, prefixed, [12] * len(prefixed)),
            repeated=repeated,
            penalized={
                penalty: reference(model, repeated, max_new_tokens=25, repetition_penalty=penalty)
                for penalty in (0.7, 1.3)
            },
        )

    return compute


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest, theirs: Callable[[str], Any]) -> Any:
    """Our model with the same weights, beside what transformers computes."""
    way, shape = request.param
    expected = theirs(shape)
    return SimpleNamespace(ours=load(expected.folder, "float32", way), **vars(expected))


@pytest.fixture(scope="module", params=KERNELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder, SHAPES["135M"])
    return load(folder, "float32", request.param)


@pytest.fixture(scope="module")
def native_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder, SHAPES["135M"])
    return load(folder, "float32", "native")


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    source = random.Random(3)
    return [
        [source.randrange(6, 160) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


def reference(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """What transformers generates greedily."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=2, **options)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def references(model: Any, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """The same for many prompts at once, padded on the left, which takes a quarter of the time."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=max(lengths), do_sample=False, pad_token_id=2
    )
    answers = []
    for row, length in zip(out[:, longest:].tolist(), lengths, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in (2, 5)), length)
        answers.append(row[: min(end, length)])
    return answers


def generate(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    assert engine.kv_cache.num_sequences == 0, "all memory has been freed"
    assert engine.scheduler.reserved_bytes == 0
    return [s.output_ids for s in sequences]


def greedy(prompt: list[int], max_new_tokens: int = 40) -> Sequence:
    return Sequence(prompt, Sampling(max_new_tokens=max_new_tokens))


@pytest.mark.parametrize(
    ("max_batch_size", "max_step_tokens"), [(1, 256), (3, 8), (16, 8), (16, 256)]
)
def test_greedy_equals_transformers(pair: Any, max_batch_size: int, max_step_tokens: int) -> None:
    """Token for token in float32: alone, in batches, with prompts whole and in chunks."""
    engine = Engine(pair.ours, max_batch_size, 64 * MEGABYTE, max_step_tokens=max_step_tokens)
    sequences = [greedy(q, n) for q, n in zip(pair.questions, pair.lengths, strict=True)]
    assert generate(engine, sequences) == pair.answers


def test_interactive_sequences_between_others_change_no_token(pair: Any) -> None:
    """They arrive while others run and take steps of their own, so rows of a slab are skipped."""
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
def test_a_cached_prefix_changes_no_token(pair: Any, max_step_tokens: int) -> None:
    """Prompts with a common prefix hit the prefix cache and still equal transformers."""
    engine = Engine(
        pair.ours,
        4,
        64 * MEGABYTE,
        prefix_cache_bytes=4 * MEGABYTE,
        max_step_tokens=max_step_tokens,
    )
    for _ in range(2):
        assert generate(engine, [greedy(q, 12) for q in pair.prefixed]) == pair.prefixed_answers
    cache = engine.kv_cache.prefix_cache
    assert cache.num_hit_tokens > cache.num_lookup_tokens // 2


def test_a_prompt_is_stored_after_its_first_token_has_been_handed_out(model: Model) -> None:
    """Copying it once delayed the first token."""
    prompt = list(range(20, 20 + 5 * BLOCK_TOKENS))
    engine = Engine(model, 2, 64 * MEGABYTE, prefix_cache_bytes=MEGABYTE)
    cache = engine.kv_cache.prefix_cache
    first, second = greedy(prompt, 8), greedy(prompt, 8)
    engine.add(first)
    assert engine.step() == [first]
    assert cache.num_blocks == 0
    engine.add(second)
    engine.step()
    assert cache.num_blocks == 5
    assert second.num_reused == 4 * BLOCK_TOKENS, "a prompt of the very next step finds it"


@pytest.mark.parametrize("max_new_tokens", [1, 8])
def test_a_prompt_is_stored_even_if_its_answer_ends_at_once(
    model: Model, max_new_tokens: int
) -> None:
    engine = Engine(model, 2, 64 * MEGABYTE, prefix_cache_bytes=MEGABYTE)
    sequence = greedy(list(range(20, 20 + 5 * BLOCK_TOKENS)), max_new_tokens)
    engine.add(sequence)
    engine.step()
    engine.stop(sequence)
    assert engine.kv_cache.prefix_cache.num_blocks == 5
    assert engine.kv_cache.num_sequences == 0


@pytest.mark.parametrize("drafts", [False, True])
def test_the_next_turn_of_a_chat_reuses_the_answer(native_model: Model, drafts: bool) -> None:
    """Only prompts were cached once, so that each turn computed the answer before it again.

    Keys and values have the same bits, whether their token was generated, drafted or prefilled.
    """

    def ask(prompt: list[int]) -> Sequence:
        return Sequence(
            prompt,
            Sampling(max_new_tokens=30, ignore_eos=True),
            is_interactive=True,
            top_logprobs=None if drafts else 3,
        )

    speculation = Speculation() if drafts else None
    engine = Engine(native_model, 4, 64 * MEGABYTE, MEGABYTE, speculation=speculation)
    prompt = list(range(20, 50)) * 2
    for turn in range(3):
        sequence, alone = ask(prompt), ask(prompt)
        generate(engine, [sequence])
        generate(Engine(native_model, 1, 64 * MEGABYTE), [alone])
        assert (sequence.output_ids, sequence.logprobs) == (alone.output_ids, alone.logprobs)
        num_computed = turn and len(prompt) - 7  # the new message, and the last token before it
        assert num_computed - BLOCK_TOKENS < sequence.num_reused <= num_computed
        prompt = [*sequence.token_ids, *range(60 + turn, 66 + turn)]


@pytest.mark.parametrize("num_steps", range(1, 6))
def test_a_cancelled_chat_leaves_only_computed_tokens_in_the_cache(
    native_model: Model, num_steps: int
) -> None:
    prompt = list(range(20, 50))
    engine = Engine(native_model, 4, 64 * MEGABYTE, MEGABYTE, max_step_tokens=10)
    cancelled = Sequence(prompt, Sampling(max_new_tokens=30, ignore_eos=True), is_interactive=True)
    engine.add(cancelled)
    for _ in range(num_steps):
        engine.step()
    engine.stop(cancelled)
    following = [*cancelled.token_ids, 7, 8, 9, 10, 11]
    answers = generate(engine, [greedy(following)])
    assert answers == generate(Engine(native_model, 1, 64 * MEGABYTE), [greedy(following)])


def test_answers_of_batch_work_stay_out_of_the_prefix_cache(native_model: Model) -> None:
    """No prompt continues them; they would evict prompts."""
    engine = Engine(native_model, 4, 64 * MEGABYTE, MEGABYTE)
    generate(engine, [greedy(list(range(20, 20 + 3 * BLOCK_TOKENS)))])
    assert engine.kv_cache.prefix_cache.num_blocks == 3


def scored(prompt: list[int], max_new_tokens: int = 0, top: int = 2) -> Sequence:
    return Sequence(prompt, Sampling(max_new_tokens=max_new_tokens), top_prompt_logprobs=top)


@pytest.mark.parametrize("max_step_tokens", [8, 256])
def test_prompt_log_probabilities_equal_transformers(pair: Any, max_step_tokens: int) -> None:
    """Beside sequences that generate, with prompts whole and in chunks, cached or not."""
    engine = Engine(pair.ours, 16, 64 * MEGABYTE, 4 * MEGABYTE, max_step_tokens=max_step_tokens)
    generate(engine, [greedy(prompt, 4) for prompt in pair.questions])  # fills the prefix cache
    sequences = [scored(prompt, i % 3) for i, prompt in enumerate(pair.questions)]
    generate(engine, [*sequences, *(greedy(q, 9) for q in pair.questions[:3])])
    for i, (sequence, prompt) in enumerate(zip(sequences, pair.questions, strict=True)):
        assert sequence.finish_reason is not None
        assert sequence.output_ids == pair.answers[i][: i % 3]
        assert len(sequence.prompt_logprobs) == len(prompt) - 1
        for found, token, row in zip(
            sequence.prompt_logprobs, prompt[1:], pair.logprobs[i][:-1], strict=True
        ):
            assert found.token_id == token
            assert found.logprob == pytest.approx(row[token].item(), abs=2e-4)
            gap = row - row[token]
            assert (gap > 2e-4).sum() < found.rank <= (gap > -2e-4).sum()
            values, ids = row.topk(2)
            assert [each for each, _ in found.alternatives] == ids.tolist()
            assert [p for _, p in found.alternatives] == pytest.approx(values.tolist(), abs=2e-4)


def test_a_scored_prompt_has_the_same_bits_in_every_batch(native_model: Model) -> None:
    """However the prompt is split, and whatever else is computed in the same steps."""
    prompt = prompts(1)[0] * 3
    seen = []
    for max_step_tokens, others in ((512, 0), (50, 0), (50, 7)):
        sequence = scored(prompt)
        neighbours = [greedy(each, 30) for each in prompts(others)]
        engine = Engine(native_model, 8, 64 * MEGABYTE, max_step_tokens=max_step_tokens)
        generate(engine, [*neighbours, sequence])
        seen.append(sequence.prompt_logprobs)
    assert seen[0] == seen[1] == seen[2]


def test_a_prompt_that_is_only_scored_may_fill_the_context(model: Model) -> None:
    engine = Engine(model, 2, 64 * MEGABYTE)
    full = scored([9] * engine.max_length)
    assert generate(engine, [full]) == [[]]
    assert full.finish_reason is FinishReason.LENGTH
    assert len(full.prompt_logprobs) == engine.max_length - 1
    with pytest.raises(PromptTooLong, match="513 tokens"):
        engine.add(scored([9] * (engine.max_length + 1)))


def test_a_step_that_is_retried_scores_each_token_once(model: Model) -> None:
    """A step that fails for another sequence has already scored this one."""
    sequence, broken = scored([31, 32, 33, 34]), greedy([9, 8], 3)
    broken.constraint = Broken()
    generate(Engine(model, 4, 64 * MEGABYTE), [sequence, broken])
    assert isinstance(broken.error, RuntimeError)
    assert [each.token_id for each in sequence.prompt_logprobs] == [32, 33, 34]


class Broken:
    """A constraint that fails."""

    is_complete = is_over = False

    def mask(self) -> bytes:
        raise RuntimeError("broken")

    def accept(self, token_id: int) -> None:
        pass


def test_a_prompt_longer_than_the_prefix_cache_hits_as_far_as_it_fits(model: Model) -> None:
    """A prompt of 60 tokens once had no hit in a cache of 40: its end evicted its beginning."""
    prompt, block_bytes = list(range(20, 80)), model.config.kv_cache_bytes(BLOCK_TOKENS, 4)
    engine = Engine(model, 2, 64 * MEGABYTE, prefix_cache_bytes=40 // BLOCK_TOKENS * block_bytes)
    answers = [generate(engine, [greedy(prompt, 4)]) for _ in range(5)]
    cache = engine.kv_cache.prefix_cache
    assert cache.num_hit_tokens == 4 * 40
    assert cache.num_bytes == 40 // BLOCK_TOKENS * block_bytes
    assert answers == [answers[0]] * 5


@pytest.mark.parametrize("token_id", [-1, 170, 1 << 40])
def test_a_token_id_outside_the_vocabulary_is_an_error_of_its_query(
    model: Model, token_id: int
) -> None:
    """The kernels would read beyond the embedding."""
    with pytest.raises(QueryError, match=f"token id {token_id}, but .* 170 tokens"):
        Engine(model, 2, 64 * MEGABYTE).add(greedy([9, token_id, 9]))


def test_every_end_of_sequence_id_is_read(pair: Any) -> None:
    assert pair.ours.config.eos_ids == {2, 5}


def test_a_freed_slot_is_refilled_at_the_next_step(model: Model) -> None:
    """Two slots, one long answer and three short ones: the short ones run one after another."""
    engine = Engine(Endless(model), 2, 64 * MEGABYTE)
    shorts = [greedy([10 + i, 20], 5) for i in range(3)]
    generate(engine, [greedy([9, 8, 7], 60), *shorts])
    assert engine.num_steps == 60


def test_the_content_of_other_rows_changes_no_bit(model: Model) -> None:
    """Batches of equal shapes: a row's hidden states do not depend on what the others hold."""
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
    """Records the hidden states of every step."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.hidden: list[Any] = []

    def forward(self, batch: Batch) -> Hidden:
        hidden = super().forward(batch)
        self.hidden.append(torch.as_tensor(hidden))
        return hidden


def test_sampling_depends_on_the_seed_alone(model: Model) -> None:
    hot = Sampling(max_new_tokens=20, temperature=1.3, top_k=50, top_p=0.9, seed=5)
    alone = generate(Engine(model, 1, 64 * MEGABYTE), [Sequence([9, 9], hot)])[0]
    crowd = [Sequence(p, hot) for p in prompts(6)]
    together = generate(Engine(model, 8, 64 * MEGABYTE), [*crowd, Sequence([9, 9], hot)])[-1]
    other = Sampling(max_new_tokens=20, temperature=1.3, top_k=50, top_p=0.9, seed=6)
    assert alone == together
    assert alone != generate(Engine(model, 1, 64 * MEGABYTE), [Sequence([9, 9], other)])[0]


def test_a_step_that_is_retried_samples_the_same_tokens(model: Model) -> None:
    """The greedy row of the third step fails after the other row has been sampled."""
    hot = Sampling(max_new_tokens=20, temperature=1.3, seed=5)
    alone = generate(Engine(Endless(model), 4, 64 * MEGABYTE), [Sequence([9, 9], hot)])
    tight = Endless(model)
    tight.head = FailsOnce(model.head, 3)
    drawn, plain = Sequence([9, 9], hot), greedy([30, 31], 20)
    generate(Engine(tight, 4, 64 * MEGABYTE), [drawn, plain])
    assert [drawn.output_ids] == alone
    assert plain.num_output == 20


class FailsOnce:
    """A head whose n-th call of `best` fails."""

    def __init__(self, head: Head, number: int) -> None:
        self.logits = head.logits
        self._head, self._left = head, number

    def best(self, hidden: Hidden, masks: Masks = ()) -> list[int]:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("out of memory")
        return self._head.best(hidden, masks)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(pair: Any, penalty: float) -> None:
    settings_ = Sampling(max_new_tokens=25, repetition_penalty=penalty)
    engine = Engine(pair.ours, 4, 64 * MEGABYTE)
    sequence = Sequence(pair.repeated, settings_)
    assert generate(engine, [sequence])[0] == pair.penalized[penalty]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model of one shape, ours, and a prompt with its greedy answer."""
    folder = tmp_path_factory.mktemp("llama")
    model, prompt = save_llama(folder, SHAPES["untied"]), [9, 30, 30, 31]
    plain = reference(model, prompt, max_new_tokens=16, eos_token_id=[169])
    return SimpleNamespace(
        model=model, ours=load(folder, "float32", KERNELS[0]), prompt=prompt, plain=plain
    )


class OutputPenalties:
    """A logits processor with vLLM's formula for presence and frequency penalties."""

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self.num_prompt, self.presence, self.frequency = num_prompt, presence, frequency

    def __call__(self, ids: Any, scores: Any) -> Any:
        for token_id in ids[0, self.num_prompt :].tolist():
            scores[0, token_id] -= self.frequency
        for token_id in set(ids[0, self.num_prompt :].tolist()):
            scores[0, token_id] -= self.presence
        return scores


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-0.5, 1.25)])
def test_presence_and_frequency_penalties_follow_vllms_formula(
    small: Any, presence: float, frequency: float
) -> None:
    """They look at the answer alone: the prompt's repeated token costs nothing."""
    processor = OutputPenalties(len(small.prompt), presence, frequency)
    options = {"max_new_tokens": 40, "logits_processor": [processor]}
    expected = reference(small.model, small.prompt, **options)
    sampling = Sampling(40, presence_penalty=presence, frequency_penalty=frequency)
    engine = Engine(small.ours, 4, 64 * MEGABYTE)
    other = Sampling(40, frequency_penalty=2.0)
    answers = generate(engine, [Sequence(small.prompt, sampling), Sequence([9, 9], other)])
    assert answers[0] == expected
    assert expected != reference(small.model, small.prompt, max_new_tokens=40)


def test_logit_bias_equals_transformers(small: Any) -> None:
    """Added before the repetition penalty. A bias of -100 bans a token."""
    banned, boosted = small.plain[0], 77
    options = {"max_new_tokens": 20, "repetition_penalty": 1.2}
    bias = {(banned,): -100.0, (boosted,): 3.0}
    expected = reference(small.model, small.prompt, sequence_bias=bias, **options)
    sampling = Sampling(
        20, repetition_penalty=1.2, logit_bias=tuple((i, b) for (i,), b in bias.items())
    )
    answer = generate(Engine(small.ours, 2, 64 * MEGABYTE), [Sequence(small.prompt, sampling)])[0]
    assert answer == expected
    assert banned not in answer


def test_ignore_eos_continues_to_the_limit(small: Any) -> None:
    """`plain` was generated with another end token; one of its tokens is the model's own here."""
    ours = Endless(small.ours)
    ours.config = replace(ours.config, eos_ids=frozenset({small.plain[3]}))
    engine = Engine(ours, 4, 64 * MEGABYTE)
    stops, goes_on = [
        Sequence(small.prompt, Sampling(16, ignore_eos=ignored), top_logprobs=0)
        for ignored in (False, True)
    ]
    assert generate(engine, [stops, goes_on]) == [small.plain[:4], small.plain]
    assert (stops.finish_reason, goes_on.finish_reason) == ("stop", "length")
    assert (len(stops.logprobs), len(goes_on.logprobs)) == (3, 16)


@pytest.mark.parametrize("min_tokens", [4, 6])
@pytest.mark.parametrize("kind", ["eos", "stop token"])
def test_min_tokens_forbids_the_end_until_then(small: Any, min_tokens: int, kind: str) -> None:
    end = small.plain[3]
    expected = reference(
        small.model, small.prompt, max_new_tokens=30, min_new_tokens=min_tokens, eos_token_id=end
    )
    ours = Endless(small.ours)
    if kind == "eos":
        ours.config = replace(ours.config, eos_ids=frozenset({end}))
    stop_ids = (end,) if kind == "stop token" else ()
    engine = Engine(ours, 4, 64 * MEGABYTE)
    held = Sequence(small.prompt, Sampling(30, min_tokens=min_tokens, stop_token_ids=stop_ids))
    free = Sequence(small.prompt, Sampling(30, stop_token_ids=stop_ids))
    assert generate(engine, [held, free]) == [expected, small.plain[:4]]
    assert end not in held.output_ids[:min_tokens]


def test_bad_words_equal_transformers(small: Any) -> None:
    """Words of one and of several tokens. A word that only the prompt begins is not one."""
    words = [[small.plain[1]], [small.plain[3], small.plain[4]], [small.plain[6], 80, 81]]
    expected = reference(small.model, small.prompt, max_new_tokens=25, bad_words_ids=words)
    bad_words = (*map(tuple, words), (small.prompt[-1], expected[0]))
    sequence = Sequence(small.prompt, Sampling(25), bad_words=bad_words)
    assert generate(Engine(small.ours, 2, 64 * MEGABYTE), [sequence])[0] == expected
    assert small.plain[1] not in expected


def test_only_allowed_tokens_are_generated(small: Any) -> None:
    allowed = [2, 9, 50, 51, 52, 53, 160]
    expected = reference(
        small.model, small.prompt, max_new_tokens=25, prefix_allowed_tokens_fn=lambda *_: allowed
    )
    sampling = Sampling(25, allowed_token_ids=tuple(allowed))
    sequence = Sequence(small.prompt, sampling)
    assert generate(Engine(small.ours, 2, 64 * MEGABYTE), [sequence])[0] == expected


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(5, logit_bias=((170, 1.0),)), "logit_bias"),
        (Sampling(5, stop_token_ids=(3, 99999)), "stop_token_ids"),
        (Sampling(5, allowed_token_ids=(170,)), "allowed_token_ids"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_rejected(
    small: Any, sampling: Sampling, field: str
) -> None:
    engine = Engine(small.ours, 2, 64 * MEGABYTE)
    with pytest.raises(QueryError, match=rf"{field} contains token id (170|99999)\b.* 170 tokens"):
        engine.add(Sequence([9], sampling))


def test_settings_that_exclude_every_token_are_the_error_of_their_sequence(small: Any) -> None:
    engine = Engine(small.ours, 4, 64 * MEGABYTE)
    stuck = Sequence(small.prompt, Sampling(5, allowed_token_ids=(7,)), bad_words=((7,),))
    fine = greedy(small.prompt, 5)
    generate(engine, [stuck, fine])
    assert isinstance(stuck.error, QueryError)
    assert "contradict each other" in str(stuck.error)
    assert fine.output_ids == small.plain[:5]


def test_a_prompt_that_leaves_no_room_is_rejected_with_its_length(model: Model) -> None:
    engine = Engine(model, 2, 64 * MEGABYTE)
    with pytest.raises(PromptTooLong, match=r"context length is 512 tokens, .* at least 1$"):
        engine.add(greedy([9] * 512))
    with pytest.raises(PromptTooLong, match=r"context length is 512 tokens$"):  # it said 513
        engine.add(greedy([9] * 513, 0))
    last = greedy([9] * 511, 50)
    generate(engine, [last])
    assert last.num_output == 1


def test_prompt_that_exceeds_the_kv_cache_is_rejected_with_its_size(model: Model) -> None:
    """The error was about the model's context length."""
    num_bytes = 300 * model.config.kv_cache_bytes(1, 4)
    engine = Engine(model, 2, num_bytes)
    room = engine.max_length
    assert 0 < room < 400
    with pytest.raises(PromptTooLong, match=f"KV cache has room for {room} .*--kv-cache-mb"):
        engine.add(greedy([9] * room))
    with pytest.raises(PromptTooLong, match="model's maximum context length is 512"):
        engine.add(greedy([9] * 512))
    last = greedy([9] * (room - 1), 50)
    generate(engine, [last])
    assert last.num_output == 1


def test_an_answer_that_fills_the_context_ends_with_length(model: Model) -> None:
    sequence = greedy([9] * 500, 10**30)
    generate(Engine(Endless(model), 2, 64 * MEGABYTE), [sequence])
    assert (sequence.num_output, sequence.finish_reason) == (12, FinishReason.LENGTH)


def test_the_kv_cache_is_bounded(model: Model) -> None:
    """Sequences wait for memory even if slots are free; all are answered."""
    per_sequence = model.config.kv_cache_bytes(128, 4)
    engine = Engine(model, 16, 3 * per_sequence)
    for prompt in prompts(10, 60):
        engine.add(greedy(prompt + [9] * 40, 28))
    peak = 0
    while engine.has_work:
        engine.step()
        peak = max(peak, engine.scheduler.reserved_bytes)
    assert 0 < peak <= 3 * per_sequence
    with pytest.raises(PromptTooLong):
        Engine(model, 1, per_sequence).add(greedy([9] * 128))


class Faulty(Endless):
    """Fails if the batch contains a token of `poison`."""

    poison: frozenset[int] = frozenset()

    def forward(self, batch: Batch) -> Hidden:
        if self.poison & set(batch.token_ids.tolist()):
            raise RuntimeError("out of memory")
        return super().forward(batch)


@given(culprits=st.sets(st.integers(0, 8), max_size=4))
@settings(max_examples=12)
def test_a_failing_step_is_bisected_to_the_sequences_at_fault(
    model: Model, culprits: set[int]
) -> None:
    """The others get the same tokens as if those were absent."""
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


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_engine_that_cannot_compute_anything_gives_up_at_once(
    model: Model, batch_size: int
) -> None:
    faulty = Faulty(model)
    faulty.poison = frozenset(range(160))
    engine = Engine(faulty, 4, 64 * MEGABYTE)
    for i in range(batch_size):
        engine.add(greedy([8 + i, 9]))
    with pytest.raises(BackendError, match="no longer compute even a single token: out of memory"):
        engine.step()
    assert engine.kv_cache.num_sequences == batch_size, "nothing is left of its own sequence"


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_failing_sequences_never_end_an_engine_that_still_computes(
    model: Model, batch_size: int
) -> None:
    """Two failing queries in one batch once ended the engine, and so did five in a row."""
    faulty = Faulty(model)
    faulty.poison = frozenset({9})
    engine = Engine(faulty, 4, 64 * MEGABYTE)
    for _ in range(8):
        failing = [greedy([9, 9]) for _ in range(batch_size)]
        assert generate(engine, failing) == [[]] * batch_size
        assert all("out of memory" in str(s.error) for s in failing)
    assert generate(engine, [greedy([8, 8], 1)]) != [[]]


def test_stopping_frees_everything_at_once(model: Model) -> None:
    """Including rows of a slab that move when others leave."""
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
