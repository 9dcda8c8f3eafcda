"""Queries that consist of a prompt alone, without pydantic, which takes long to import."""

import hashlib
from dataclasses import replace

from smolcli.settings import QueryDefaults
from smolcli.types import Message, Query

SEED_BITS = 63


def prompt_query(chat_id: str, prompt: str, defaults: QueryDefaults) -> Query:
    """The query that `parse_query` makes of an id and a prompt.

    Args:
        chat_id: its id.
        prompt: the user's message, not blank.
        defaults: values for everything else.
    """
    turns = (Message("user", prompt),)
    seed = derived_seed(defaults.sampling.seed, chat_id)
    return Query(
        chat_id=chat_id,
        messages=with_system_prompt(turns, defaults.system_prompt),
        sampling=replace(defaults.sampling, seed=seed),
        format=defaults.format,
    )


def with_system_prompt(turns: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The conversation, preceded by the system prompt, if any."""
    return (Message("system", system), *turns) if system else turns


def split_answers(query: Query) -> list[Query]:
    """One query for each of the `n` answers; the first answer equals that of the query with n=1.

    Only the first one has the log probabilities of the prompt.
    """
    seed = query.sampling.seed
    seeds = [seed, *(derived_seed(seed, str(index)) for index in range(1, query.n))]
    first, *others = (replace(query.sampling, seed=each) for each in seeds)
    return [
        replace(query, n=1, sampling=first),
        *(replace(query, n=1, sampling=each, prompt_logprobs=None) for each in others),
    ]


def derived_seed(seed: int, name: str) -> int:
    """The seed of one query, derived from the run's seed and the query's id alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (1 << SEED_BITS) - 1
