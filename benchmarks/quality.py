"""How close the answers of a dtype are to those of float32, on the same weights.

    python -m benchmarks.quality --dtype int8
    python -m benchmarks.quality --dtype bfloat16 --model FOLDER --questions 64

float32 answers every question greedily. Then both dtypes read its answers (teacher forcing), which
gives the share of tokens that the dtype also finds most likely (top-1 agreement) and the KL
divergence of its predictions from those of float32 per token, in nats. Finally the dtype answers
the questions itself, and the two sets of answers are compared.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from smolcli.bench.workload import reference
from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Model
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message, Sampling
from smolcli.weights.loader import load_model, resolve_model_config
from smolcli.weights.resolve import resolve

Array = np.ndarray[Any, Any]

SLOTS = 64
TEMPLATES = (
    "What is {} used for?",
    "Describe {} to a child in two sentences.",
    "Give two advantages and two disadvantages of {}.",
    "Write a short poem about {}.",
)
TOPICS = (
    *("a bicycle", "salt", "the moon", "a compass", "cotton", "glass", "a thermometer", "paper"),
    *("a bridge", "sunlight", "chess", "a violin", "rain", "copper", "a library", "yeast"),
    *("email", "a calendar", "steel", "a garden", "tea", "a telescope", "wool", "a lighthouse"),
    *("mathematics", "a microscope", "wind power", "soap", "a map", "honey", "a magnet", "rice"),
    *("a train", "music"),
)


def questions(number: int) -> list[str]:
    """The reference questions, then the topics in the templates: up to 200."""
    asked = [query.messages[0].content for query in reference(64)]
    made = [template.format(topic) for topic, template in product(TOPICS, TEMPLATES)]
    return [*asked, *made][:number]


def answer(model: Model, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers, as token ids."""
    engine = Engine(model, SLOTS, 4 << 30)
    sequences = [Sequence(ids, Sampling(max_new_tokens=max_new_tokens)) for ids in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.num_waiting or engine.scheduler.running:
        engine.step()
    return [sequence.token_ids[len(sequence.prompt_ids) :] for sequence in sequences]


def predictions(model: Model, prompt: list[int], said: list[int]) -> Array:
    """Logits at each position of an answer, (tokens, vocabulary)."""
    cache = model.make_kv_cache(0)
    sequence = Sequence([*prompt, *said[:-1]], top_prompt_logprobs=0)  # all hidden states
    cache.allocate(sequence)
    step = ScheduledSequence(sequence, 0, len(sequence.token_ids))
    hidden = model.forward(cache.make_batch([step]))
    logits: Array = np.asarray(model.head.logits(hidden[len(prompt) - 1 :]))
    return logits


def agreement(exact: Array, found: Array) -> tuple[Array, Array]:
    """Per token: whether the most likely tokens agree, and the KL divergence."""
    expected, seen = log_softmax(exact), log_softmax(found)
    divergence = (np.exp(expected) * (expected - seen)).sum(axis=-1)
    return expected.argmax(axis=-1) == seen.argmax(axis=-1), divergence


def log_softmax(logits: Array) -> Array:
    """Log probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def summary(
    asked: list[str], texts: tuple[list[str], list[str]], agreements: list[tuple[Array, Array]]
) -> Iterator[str]:
    """What was measured, and a few answers that differ."""
    same, divergence = (np.concatenate(part) for part in zip(*agreements, strict=True))
    error = 100 * np.sqrt(same.mean() * (1 - same.mean()) / len(same))
    yield f"top-1 agreement: {100 * same.mean():.1f} % of {len(same)} tokens, +- {error:.1f}"
    most = np.quantile(divergence, 0.99)
    yield f"KL divergence: {divergence.mean():.5f} nats per token, 99th percentile {most:.3f}"
    different = [i for i in range(len(asked)) if texts[0][i] != texts[1][i]]
    yield f"equal answers: {len(asked) - len(different)} of {len(asked)}"
    for i in different[:5]:
        yield f"\n{asked[i]}\n  float32: {texts[0][i]!r}\n  other:   {texts[1][i]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="int8", choices=["bfloat16", "int8"])
    parser.add_argument("--questions", type=int, default=200, help="at most 200")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    folder = resolve(args.model).folder
    chat = ChatTokenizer.load(folder)
    models = []
    for dtype in ("float32", args.dtype):
        config = resolve_model_config(EngineSettings(dtype=dtype), folder)
        models.append(
            load_model(folder, config.dtype, config.device, config.kernels, config.threads)
        )
    asked = questions(args.questions)
    prompts = [chat.encode((Message("user", text),)) for text in asked]
    exact, found = (answer(model, prompts, args.max_new_tokens) for model in models)
    agreements = [
        agreement(*(predictions(model, prompt, said) for model in models))
        for prompt, said in zip(prompts, exact, strict=True)
    ]
    texts = ([chat.decode(ids) for ids in exact], [chat.decode(ids) for ids in found])
    for line in summary(asked, texts, agreements):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
