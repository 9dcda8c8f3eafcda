"""smol: batch inference, and a server, for SmolLM2 on your own machine.

Importing this package is cheap: its modules are imported when their names are used, and the model's
libraries are loaded when an `LLM` is created.

    from smolcli import LLM

    with LLM() as llm:
        print(llm.chat("What is gravity?").response)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from smolcli.llm import LLM
    from smolcli.types import ErrorCode, FinishReason, Message, Result, Timings, Usage

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


_MODULES = {"LLM": "llm"} | dict.fromkeys(
    ["ErrorCode", "FinishReason", "Message", "Result", "Timings", "Usage"], "types"
)


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: `smol` handles Ctrl-C only once this file has run."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"smolcli.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
