"""Frozen values that the doors make from their options; nothing else reads the environment."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smolcli.types import AnswerFormat, Sampling

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPENAI_TEMPERATURE = 1.0  # what its API draws at unless asked otherwise
MOST_SLOTS = 64  # measured: more do not answer faster on a CPU


def smol_home() -> Path:
    """The folder of the model store: SMOL_HOME, else ~/.cache/smolcli."""
    return Path(os.environ.get("SMOL_HOME") or Path.home() / ".cache" / "smolcli")


@dataclass(frozen=True, slots=True)
class QueryDefaults:
    """What a query that leaves a field out gets; `sampling.seed` is the run's seed.

    `several_temperature` is that of a request in OpenAI's words for more than one answer.
    """

    sampling: Sampling = field(default_factory=Sampling)
    system_prompt: str | None = None
    extra_fields: Literal["error", "ignore", "keep"] = "error"
    format: AnswerFormat | None = None
    several_temperature: float = OPENAI_TEMPERATURE


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which model answers, and with what; 0 or None: see `engine.autoconfig`."""

    model: str = DEFAULT_MODEL
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    threads: int = 0
    max_batch_size: int = 0
    max_concurrency: int = 8
    kv_cache_mb: int = 0
    prefix_cache_mb: int | None = None

    @property
    def most_slots(self) -> int:
        """How many slots there can be, for those who plan without having seen model or machine."""
        return self.max_batch_size or MOST_SLOTS


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """Servers that answer in this process' stead; `model` None and `dtype` auto: what they have."""

    urls: tuple[str, ...]
    api: Literal["auto", "smol", "openai"] = "auto"
    api_key: str | None = None
    model: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_concurrency: int = 8
    retry_s: float = 10.0
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Where on Ray workers run; `address` None: on a cluster started here, 0 workers: what fits."""

    address: str | None = None
    workers: int = 0
    gpus_per_worker: float = 0.0


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How a row of data becomes a query; `prompt` None: its columns are named as a query's fields.

    `id_column` None: `chat_id` where a row has it, else the row's number; `fields` go from the row
    into its result.
    """

    prompt: str | None = None
    id_column: str | None = None
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One `smol run`; `output` Path("-") is stdout, `table` what is made of it in the end.

    `errors` None: failed lines go into the output too.
    """

    input: Path
    output: Path
    defaults: QueryDefaults = field(default_factory=QueryDefaults)
    engine: EngineSettings = field(default_factory=EngineSettings)
    seed: int | None = None
    limit: int | None = None
    errors: Path | None = None
    retry_errors: bool = False
    overwrite: bool = False
    with_timings: bool = False
    rows: RowSettings = field(default_factory=RowSettings)
    table: Path | None = None


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What a benchmark times: prompts of so many words, batches of so many answers, questions."""

    prompts: tuple[int, ...] = (128, 1024)
    sizes: tuple[int, ...] = (1, 8, 32, 64)
    num_questions: int = 64


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One `smol serve`; `port` 0 means one that is free."""

    host: str = "127.0.0.1"
    port: int = 8000
    defaults: QueryDefaults = field(default_factory=QueryDefaults)
    engine: EngineSettings = field(default_factory=EngineSettings)
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_batch_queries: int = 1000
    max_queue: int = 2000
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    is_gateway: bool = False
    log_prompts: bool = False
