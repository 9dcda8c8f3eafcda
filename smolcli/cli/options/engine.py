"""Options for the model and for the engine that runs it."""

import functools
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from smolcli.cli.options import option, read_text
from smolcli.errors import SmolError, UsageError
from smolcli.settings import Dtype, EngineSettings

_DEFAULTS = EngineSettings()
_engine = functools.partial(option, panel="Model and engine")


def stored_models(incomplete: str) -> list[str]:
    """Names of stored models that begin with `incomplete`, for shell completion."""
    from smolcli.weights.store import entries

    with suppress(SmolError):  # the command that is being typed will report it
        return [entry.name for entry in entries() if entry.name.startswith(incomplete)]
    return []


_stored_model = functools.partial(
    typer.Argument,
    metavar="MODEL",
    help="Name of a model, as listed by smol models list.",
    autocompletion=stored_models,
)
StoredModel = Annotated[str, _stored_model()]
StoredModels = Annotated[list[str], _stored_model()]
Dedupe = Annotated[
    bool,
    _engine(
        "--dedupe/--no-dedupe",
        help="Compute identical queries once and share the answer.",
    ),
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which model to run, and with which resources."""

    model: Annotated[
        str,
        _engine(
            "--model",
            metavar="MODEL",
            help="Model to use: a name on the Hugging Face Hub, a local directory or a .gguf file.",
            completion=stored_models,
        ),
    ] = _DEFAULTS.model
    dtype: Annotated[
        Dtype,
        _engine(
            "--dtype",
            metavar="DTYPE",
            help="Data type to compute in. auto: bfloat16 if the hardware supports it, "
            "otherwise float32. int8 (CPU only) is faster but less exact.",
        ),
    ] = _DEFAULTS.dtype
    device: Annotated[
        str,
        _engine(
            "--device",
            metavar="DEVICE",
            help="Device to run on: cpu, cuda, cuda:1 and so on. auto: the CPU.",
        ),
    ] = _DEFAULTS.device
    threads: Annotated[
        int,
        _engine(
            "--threads",
            metavar="N",
            help="Number of CPU threads. 0: one per available physical core.",
            min=0,
            max=1024,
        ),
    ] = _DEFAULTS.threads
    max_batch_size: Annotated[
        int,
        _engine(
            "--max-batch-size",
            metavar="N",
            help="Maximum number of queries in a batch. 0: chosen for the machine.",
            min=0,
        ),
    ] = _DEFAULTS.max_batch_size
    max_concurrency: Annotated[
        int,
        _engine(
            "--max-concurrency",
            metavar="N",
            help="Maximum number of queries to tokenize at once or, with remote servers, to have "
            "in flight.",
            min=1,
            alias="HOSTING_MAX_CONCURRENCY",
        ),
    ] = _DEFAULTS.max_concurrency
    kv_cache_mb: Annotated[
        int,
        _engine(
            "--kv-cache-mb",
            metavar="MIB",
            help="Size of the KV cache, in MiB. 0: chosen for the machine.",
            min=0,
        ),
    ] = _DEFAULTS.kv_cache_mb
    prefix_cache_mb: Annotated[
        int | None,
        _engine(
            "--prefix-cache-mb",
            metavar="MIB",
            help="Size of the prefix cache, in MiB. A prefix that prompts share is computed once. "
            "0: disabled. Default: 1/32 of the memory, at most 256.",
            min=0,
        ),
    ] = _DEFAULTS.prefix_cache_mb
    speculation: Annotated[
        bool,
        _engine(
            "--speculation/--no-speculation",
            help="While a single query runs, draft tokens from its prompt and from the answers so "
            "far, and keep those that the model confirms. This makes greedy answers faster and "
            "does not change them.",
        ),
    ] = _DEFAULTS.speculation
    chat_template: Annotated[
        str | None,
        _engine(
            "--chat-template",
            metavar="FILE|NAME",
            help="Jinja chat template to use instead of the model's own: a file, or chatml. Models "
            "without a template need one to answer messages.",
        ),
    ] = None

    def settings(self) -> EngineSettings:
        """The engine settings that these options stand for.

        Raises:
            UsageError: the chat template cannot be read.
        """
        source = template_source(self.chat_template)
        return EngineSettings(**asdict(self) | {"chat_template": source})


def template_source(template: str | None) -> str:
    """The source of a chat template that is given as a file or by name; "" for the model's own.

    Raises:
        UsageError: the value or the file is empty, or the file cannot be read.
    """
    if template is None:
        return ""
    if not template:
        raise UsageError("--chat-template must not be empty")
    from smolcli.text.chat_template import NAMED_TEMPLATES

    if template in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[template]
    source = read_text("--chat-template", Path(template))
    if not source.strip():
        raise UsageError(f"--chat-template {template}: the file is empty")
    return source
