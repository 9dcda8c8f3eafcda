"""smol: batch inference, and a server, for SmolLM2 on your own machine.

Importing this package is cheap: the model's libraries are loaded when an `LLM` is created.

    from smolcli import LLM

    with LLM() as llm:
        print(llm.chat("What is gravity?").response)
"""

from typing import TYPE_CHECKING, Any

from smolcli.errors import (
    BackendError,
    HubUnreachable,
    InputError,
    ModelError,
    ModelNotFound,
    PromptTooLong,
    QueryError,
    ResumeError,
    RunError,
    SmolError,
    UsageError,
)
from smolcli.types import ErrorCode, FinishReason, Message, Result, Timings, Usage

if TYPE_CHECKING:
    from smolcli.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BackendError",
    "ErrorCode",
    "FinishReason",
    "HubUnreachable",
    "InputError",
    "Message",
    "ModelError",
    "ModelNotFound",
    "PromptTooLong",
    "QueryError",
    "Result",
    "ResumeError",
    "RunError",
    "SmolError",
    "Timings",
    "Usage",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from smolcli.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
