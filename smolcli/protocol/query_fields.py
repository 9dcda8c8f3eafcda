"""The wire schema of a query: the fields that it may have, and what each of them must be.

A line of a file, the body of a request and an item of a batch have this one shape.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from smolcli.protocol.formats import (
    CHOICES_DESCRIPTION,
    FORMAT_DESCRIPTION,
    Choices,
    ResponseFormat,
)

MAX_SEED = 2**63 - 1
MAX_ANSWERS = 16
MAX_LOGPROBS = 20

Text = Annotated[str, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
StopString = Annotated[str, Field(strict=True, min_length=1, max_length=1000)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]
ChatId = Annotated[str, Field(strict=True, min_length=1)]
Count = Annotated[Whole, Field(ge=1)]
Temperature = Annotated[Number, Field(ge=0, le=100)]
TopP = Annotated[Number, Field(gt=0, le=1)]
TopK = Annotated[Whole, Field(ge=0)]
Penalty = Annotated[Number, Field(gt=0, le=100)]
Seed = Annotated[Whole, Field(ge=0, le=MAX_SEED)]
NumAnswers = Annotated[Whole, Field(ge=1, le=MAX_ANSWERS)]


def decimal_id(value: object) -> object:
    """An integer id is taken as its decimal string."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _listed(value: object) -> object:
    """One stop string is a list of one."""
    return [value] if isinstance(value, str) else value


class MessageFields(BaseModel):
    """One turn of `messages`."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


class QueryFields(BaseModel):
    """The fields a query may have; a description reads on from "<field> must be"."""

    model_config = ConfigDict(extra="forbid")

    chat_id: Annotated[ChatId, BeforeValidator(decimal_id, json_schema_input_type=ChatId | int)] = (
        Field(description="a non-empty string or an integer")
    )
    user_prompt: Text | None = Field(None, description="a string that is not blank")
    system_prompt: Text | None = Field(None, description="a string")
    messages: Annotated[list[MessageFields], Field(min_length=1)] | None = Field(
        None, description="a non-empty list of {role, content}, the last from the user"
    )
    max_new_tokens: Count | None = Field(None, description="a whole number from 1")
    temperature: Temperature | None = Field(None, description="a number from 0 (greedy) to 100")
    top_p: TopP | None = Field(None, description="a number above 0 and up to 1")
    top_k: TopK | None = Field(None, description="a whole number from 0 (off)")
    repetition_penalty: Penalty | None = Field(None, description="a number above 0 and up to 100")
    seed: Seed | None = Field(None, description="a whole number from 0 to 2^63 - 1")
    stop: (
        Annotated[
            StopStrings, BeforeValidator(_listed, json_schema_input_type=StopStrings | StopString)
        ]
        | None
    ) = Field(None, description="a non-empty string or a list of up to 16 of them")
    response_format: ResponseFormat | None = Field(None, description=FORMAT_DESCRIPTION)
    choices: Choices | None = Field(None, description=CHOICES_DESCRIPTION)
    n: NumAnswers | None = Field(None, description=f"a whole number from 1 to {MAX_ANSWERS}")
    logprobs: Flag | None = Field(None, description="true or false")
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description=f"a whole number from 0 to {MAX_LOGPROBS}, where logprobs is true"
    )
    metadata: dict[str, Any] | None = Field(None, description="an object")


FIELDS = QueryFields.model_fields
