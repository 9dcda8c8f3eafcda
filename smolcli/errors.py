"""Every exception smol raises on purpose.

SmolError
├── QueryError              the fault of one query: becomes its error line, never ends a run
│   └── PromptTooLong
├── UsageError              the command cannot be carried out as given (exit 2)
│   └── ResumeRefused       the output on disk belongs to another run
└── RunError                the work cannot go on (exit 1)
    ├── InputError          the input cannot be read
    ├── ModelError          no usable model
    │   ├── ModelNotFound
    │   └── HubUnreachable
    └── BackendError        whatever computes the answers is gone
"""

from smolcli.types import ErrorCode


class SmolError(Exception):
    """Base of all; its text is a sentence that a user can act on."""


class QueryError(SmolError):
    """One query cannot be answered.

    Args:
        message: a sentence for people.
        code: what kind of fault it is.
        field: the field at fault, where there is one.
    """

    def __init__(
        self, message: str, code: ErrorCode = ErrorCode.INVALID_VALUE, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class PromptTooLong(QueryError):
    """The prompt alone leaves no room for a single new token."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens, but the maximum context length is "
            f"{limit + 1} tokens, of which the answer needs at least 1",
            ErrorCode.PROMPT_TOO_LONG,
        )


class UsageError(SmolError):
    """The command cannot be carried out as it was given."""


class ResumeRefused(UsageError):
    """The output on disk was made by another run, and continuing it would mix the two."""


class RunError(SmolError):
    """The work cannot go on; what is finished stays finished."""


class InputError(RunError):
    """The input cannot be read, or not to its end."""


class ModelError(RunError):
    """The model cannot be used."""


class ModelNotFound(ModelError):
    """No model of that name or path is to be had."""


class HubUnreachable(ModelError):
    """The Hugging Face Hub did not answer."""


class BackendError(RunError):
    """Whatever computes the answers is gone."""
