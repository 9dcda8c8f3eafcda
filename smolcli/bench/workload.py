"""The workload: prompts of a given length, batches of a given size, and real questions."""

import json
from pathlib import Path

from smolcli.batch.validation import prompt_fits
from smolcli.errors import PromptTooLong, UsageError
from smolcli.settings import BenchPlan, EngineSettings
from smolcli.text.tokenizer import context_length
from smolcli.types import Message, Query, Sampling
from smolcli.weights.resolve import resolve

QUESTIONS = Path(__file__).with_name("reference.jsonl")
REFERENCE_TOKENS = 128
STORY_TOKENS = 64
WORDS = ("river", "clock", "garden", "letter", "storm", "bridge", "violin", "harbour")


def reference(num_questions: int = 64, max_new_tokens: int = REFERENCE_TOKENS) -> list[Query]:
    """The first of 64 real questions on various topics."""
    lines = QUESTIONS.read_text("utf-8").splitlines()[:num_questions]
    return [
        _query(number, json.loads(line)["user_prompt"], max_new_tokens)
        for number, line in enumerate(lines)
    ]


def stories(number: int, max_new_tokens: int = STORY_TOKENS) -> list[Query]:
    """Distinct prompts of equal length whose answers all reach `max_new_tokens`."""
    return [
        _query(n, f"Write a long story about {n + 10} years and a {WORDS[n % 8]}.", max_new_tokens)
        for n in range(number)
    ]


def long_prompt(num_words: int, turn: int) -> Query:
    """A prompt of about `num_words` tokens whose beginning differs from every other turn's."""
    text = " ".join(WORDS[(n * n + turn) % 8] for n in range(num_words))
    return _query(turn, f"{turn + 2} {text}", max_new_tokens=1)


def check_prompts(plan: BenchPlan, settings: EngineSettings) -> None:
    """Check that the prompts of a plan fit a local model before anything is measured.

    Raises:
        UsageError: the model's context is too short.
    """
    folder = resolve(settings.model).folder
    check, longest = prompt_fits(folder, settings.chat_template), context_length(folder)
    for length in plan.prompts:
        try:
            check(long_prompt(min(length, longest), 0))  # no word is less than a token
        except PromptTooLong as exc:
            raise UsageError(
                f"a prompt of {length} words does not fit the model's context of {longest} tokens; "
                "pass shorter --prompts"
            ) from exc


def _query(number: int, prompt: str, max_new_tokens: int) -> Query:
    return Query(str(number), (Message("user", prompt),), Sampling(max_new_tokens))
