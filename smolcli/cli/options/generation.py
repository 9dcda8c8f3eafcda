"""How answers are generated."""

import functools
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from smolcli.cli.options import option, refuse_no_text
from smolcli.errors import QueryError, UsageError
from smolcli.settings import OPENAI_TEMPERATURE, QueryDefaults
from smolcli.types import AnswerFormat, Sampling

_DEFAULTS = Sampling()
_generation = functools.partial(option, panel="Generation")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What a query that does not say for itself is answered with; named as a query's fields."""

    max_new_tokens: Annotated[
        int, _generation("--max-new-tokens", help="The most tokens an answer may have.")
    ] = _DEFAULTS.max_new_tokens
    temperature: Annotated[
        float | None,
        _generation("--temperature", help="0, the default: always the likeliest token."),
    ] = None
    top_p: Annotated[
        float,
        _generation("--top-p", help="Draw from the likeliest tokens of this share."),
    ] = _DEFAULTS.top_p
    top_k: Annotated[
        int,
        _generation("--top-k", help="Draw from so many likeliest tokens; 0: all."),
    ] = _DEFAULTS.top_k
    repetition_penalty: Annotated[
        float,
        _generation("--repetition-penalty", help="Above 1: fewer repetitions."),
    ] = _DEFAULTS.repetition_penalty
    seed: Annotated[
        int | None, _generation("--seed", help="Where randomness starts from; drawn if not given.")
    ] = None
    system_prompt: Annotated[
        str | None, _generation("--system", help="System prompt; the model has its own default.")
    ] = None

    def query_defaults(
        self,
        extra_fields: Literal["error", "ignore", "keep"] = "error",
        answers: AnswerFormat | None = None,
    ) -> QueryDefaults:
        """These options as settings; the schema of a query decides what they may be.

        Raises:
            UsageError: naming the option at fault.
        """
        from smolcli.protocol.query import parse_query  # late: imports pydantic

        refuse_no_text("--system", self.system_prompt)
        query = {"chat_id": "-", "user_prompt": "-"} | asdict(self)
        try:
            sampling = parse_query(query, QueryDefaults()).sampling
        except QueryError as exc:
            raise UsageError(str(exc)) from exc
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        several = OPENAI_TEMPERATURE if self.temperature is None else self.temperature
        return QueryDefaults(
            sampling=replace(sampling, seed=seed),
            system_prompt=self.system_prompt,
            extra_fields=extra_fields,
            format=answers,
            several_temperature=several,
        )
