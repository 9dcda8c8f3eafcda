"""Frozen settings, which the entry points build from their options.

Nothing below the entry points reads the environment, except for the location of the model store.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smolcli.errors import UsageError
from smolcli.types import AnswerFormat, Sampling

InputFormat = Literal[
    "auto",
    "smol",
    "openai",
    "bare",
    "text",
    "jsonl",
    "json",
    "csv",
    "tsv",
    "parquet",
    "arrow",
    "sqlite",
]

ResolvedDtype = Literal["float32", "bfloat16", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "int8"]

ALL_FIELDS = ("*",)  # as the fields of a run: every column

RESULTS_TABLE = "results"

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_SEED = -1  # counts as absent, as in vLLM and llama.cpp
OPENAI_TEMPERATURE = 1.0  # the default of OpenAI's API
HOME_VARIABLE = "SMOL_HOME"
MAX_AUTO_SLOTS = 64  # more do not increase the throughput of a CPU


def smol_home() -> Path:
    """The folder of the model store: $SMOL_HOME, or ~/.cache/smolcli.

    Raises:
        UsageError: the user has no home directory, and SMOL_HOME is not set.
    """
    if folder := os.environ.get(HOME_VARIABLE):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "smolcli"
    except RuntimeError as exc:
        raise UsageError(
            "cannot find your home directory; set SMOL_HOME to a directory for models"
        ) from exc


@dataclass(frozen=True, slots=True)
class QueryDefaults:
    """Values for the fields that a query leaves out.

    Args:
        sampling: sampling parameters; its seed is the run's seed.
        system_prompt: system prompt for queries without one.
        extra_fields: whether unknown fields are errors, ignored, or kept as metadata.
        format: what answers are constrained to.
        several_temperature: temperature of an OpenAI request for several answers.
    """

    sampling: Sampling = field(default_factory=Sampling)
    system_prompt: str | None = None
    extra_fields: Literal["error", "ignore", "keep"] = "error"
    format: AnswerFormat | None = None
    several_temperature: float = OPENAI_TEMPERATURE


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The model, and the resources that it may use; `engine.autoconfig` resolves what is left open.

    Args:
        model: a name on the Hugging Face Hub, a local directory or a .gguf file.
        dtype: data type to compute in; auto chooses the fastest that is as exact as the weights.
        device: cpu, cuda, cuda:1 and so on; auto means the CPU.
        threads: number of CPU threads; 0 means one per available core.
        max_batch_size: maximum number of queries to generate at once; 0 chooses for the machine.
        max_concurrency: number of threads that tokenize or, with remote servers, of concurrent
            requests to each.
        kv_cache_mb: size of the KV cache in MiB; 0 chooses for the machine.
        prefix_cache_mb: size of the prefix cache in MiB; 0 disables it, None chooses for the
            machine.
        speculation: whether to draft tokens while one query runs alone.
        chat_template: source of a template to use instead of the model's own; "" for none.
    """

    model: str = DEFAULT_MODEL
    dtype: Dtype = "auto"
    device: str = "cpu"
    threads: int = 0
    max_batch_size: int = 0
    max_concurrency: int = 8
    kv_cache_mb: int = 0
    prefix_cache_mb: int | None = None
    speculation: bool = True
    chat_template: str = ""

    @property
    def chat_template_digest(self) -> str | None:
        """Identifies the chat template if it is not the model's own."""
        if not self.chat_template:
            return None
        return hashlib.sha256(self.chat_template.encode()).hexdigest()

    @property
    def max_slots(self) -> int:
        """The largest possible batch size, for planning before the model is loaded."""
        return self.max_batch_size or MAX_AUTO_SLOTS


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """Upstream servers that compute the answers.

    Args:
        urls: the servers' base URLs.
        api: the API that they implement; auto detects it.
        api_key: sent as a bearer token.
        model: the model they must serve; None accepts any.
        dtype: the dtype they must use; auto accepts any.
        max_concurrency: concurrent requests per server.
        retry_s: how long to keep retrying an unreachable server, in seconds.
        timeout_s: how long one request may take, in seconds.
    """

    urls: tuple[str, ...]
    api: Literal["auto", "smol", "openai"] = "auto"
    api_key: str | None = None
    model: str | None = None
    dtype: Dtype = "auto"
    max_concurrency: int = 8
    retry_s: float = 10.0
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Where Ray workers run.

    Args:
        address: address of a running cluster; None starts a local one.
        workers: number of workers; 0 means one per GPU, or one per node without GPUs.
        gpus_per_worker: number of GPUs per worker; may be fractional.
    """

    address: str | None = None
    workers: int = 0
    gpus_per_worker: float = 0.0


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How an input is read, and how its rows become queries.

    Args:
        prompt: template of the prompt; None if the columns are named like query fields.
        id_column: the column with the ids; None uses `chat_id` if present, otherwise the row
            number.
        fields: columns to copy to the metadata of the result, or ALL_FIELDS.
        input_format: format of the input; auto detects it from the file name and the content.
        encoding: text encoding; None means UTF-8, or UTF-16 or UTF-32 if detected.
        delimiter: delimiter of a CSV file; None detects it from the first rows.
        truncate_prompt: cut prompts that leave no room for their answer.
        query: SQL query for the rows of an SQLite database.
        table: table of an SQLite database; None reads the only one.
    """

    prompt: str | None = None
    id_column: str | None = None
    fields: tuple[str, ...] = ()
    input_format: InputFormat = "auto"
    encoding: str | None = None
    delimiter: str | None = None
    truncate_prompt: bool = False
    query: str | None = None
    table: str | None = None

    @property
    def maps_rows(self) -> bool:
        """Whether rows are mapped to queries rather than being queries already."""
        return self.prompt is not None or self.id_column is not None or bool(self.fields)


@dataclass(frozen=True, slots=True)
class InputFile:
    """One of several inputs.

    Args:
        name: the file's name in the results.
        path: path of the file, or of the local copy of a remote one.
    """

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One `smol run`.

    Args:
        input: the input file, or `-` for stdin; the first of several.
        output: the results as JSON lines, or `-` for stdout.
        defaults: values for the fields that queries leave out.
        engine: the model and its resources.
        seed: the run's seed; None picks one at random, or keeps that of the run to resume.
        limit: maximum number of rows to answer; None for all.
        errors: where failed lines go; None leaves them in the output.
        retry_errors: answer only the failed lines of a finished output.
        overwrite: discard an existing output.
        with_timings: add timings to the results.
        rows: how rows become queries.
        table: the table made from the results at the end, such as a CSV file or an SQLite
            database; None for none.
        table_name: name of the table in an SQLite database.
        files: the input files, if results carry the names of their files; () otherwise.
        input_name: name of a single input in messages and the manifest; None means its path.
        model_name: name of the model in answers in OpenAI's format; None means its own.
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
    files: tuple[InputFile, ...] = ()
    table_name: str = RESULTS_TABLE
    input_name: str | None = None
    model_name: str | None = None


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What a benchmark measures.

    Args:
        prompts: prompt lengths in words, for prefill.
        sizes: batch sizes, for decoding.
        num_questions: number of real questions, for a whole run.
    """

    prompts: tuple[int, ...] = (128, 1024)
    sizes: tuple[int, ...] = (1, 8, 32, 64)
    num_questions: int = 64


@dataclass(frozen=True, slots=True)
class BatchApiSettings:
    """What /v1/files and /v1/batches may store.

    Args:
        folder: the directory of files and batches.
        is_required: whether the server must not start without the folder.
        max_file_bytes: maximum size of a file.
        max_total_bytes: maximum size of all files and results; a quarter is reserved for results.
        max_requests: maximum number of requests in a file.
        max_open: maximum number of unfinished batches.
        retention_s: how long files and finished batches are kept, in seconds.
        seed: the seed of every batch; None picks one at random for each.
    """

    folder: Path
    is_required: bool = True
    max_file_bytes: int = 100 << 20
    max_total_bytes: int = 2 << 30
    max_requests: int = 50_000
    max_open: int = 100
    retention_s: int = 30 * 86_400
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One `smol serve`.

    Args:
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        defaults: values for the fields that queries leave out.
        engine: the model and its resources.
        api_keys: keys of which clients must send one; () accepts every client.
        cors_origins: web origins that browsers may send requests from.
        max_body_bytes: maximum size of a request body.
        max_batch_queries: maximum number of queries in a request.
        max_queue: maximum number of unfinished queries; requests beyond it are rejected.
        request_timeout_s: time limit for a request, in seconds.
        drain_timeout_s: how long a stopping server may take to finish requests, in seconds.
        is_gateway: whether queries are forwarded to upstream servers.
        log_prompts: whether the access log includes prompts.
        model_names: names that clients use for the model; () means its own.
        accepts_any_model: whether clients may use any other name as well.
        batches: settings of /v1/files and /v1/batches; None turns both off.
    """

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
    model_names: tuple[str, ...] = ()
    accepts_any_model: bool = False
    batches: BatchApiSettings | None = None
