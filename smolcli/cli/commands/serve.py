"""`smol serve`: the HTTP server."""

import functools
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smolcli.cli.options import option, require_utf8, variable_of, with_option_groups
from smolcli.cli.options.backend import UpstreamOptions, backend_opener, is_given
from smolcli.cli.options.engine import Dedupe, EngineOptions
from smolcli.cli.options.generation import GenerationOptions, Schema, read_schema
from smolcli.cli.terminal import log_to_stderr
from smolcli.errors import InputError, UsageError, error_reason
from smolcli.settings import (
    BatchApiSettings,
    EngineSettings,
    QueryDefaults,
    RemoteSettings,
    ServerSettings,
    smol_home,
)

if TYPE_CHECKING:
    from smolcli.backends.base import Backend

EXAMPLES = (
    "[bold]smol serve[/bold] listens on http://127.0.0.1:8000, which is also a chat page.\n\n"
    "[bold]smol serve --host 0.0.0.0 --api-key-file keys.txt[/bold] requires an API key.\n\n"
    "[bold]smol serve --served-model-name gpt-4o-mini[/bold] answers clients that ask for that "
    "model.\n\n"
    "[bold]smol serve --upstream http://10.0.0.5:8000[/bold] is a gateway to another server."
)
SWITCH_INTERVAL_S = 0.0005  # bounds how long request threads can delay the engine thread
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#@]+")

_DEFAULTS = ServerSettings()
_serve = functools.partial(option, panel="Server")
_stored = functools.partial(option, panel="Files and batches")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where to listen, whom to answer, and how much work to admit."""

    host: Annotated[str, _serve("--host", metavar="ADDRESS", help="Address to listen on.")] = (
        _DEFAULTS.host
    )
    port: Annotated[
        int,
        _serve("--port", metavar="PORT", help="Port to listen on. 0: any free port.",
               min=0, max=65535),
    ] = _DEFAULTS.port  # fmt: skip
    api_key: Annotated[
        list[str] | None,
        _serve("--api-key", metavar="KEY", help="API key that clients must send. Repeatable."),
    ] = None
    api_key_file: Annotated[
        Path | None,
        _serve("--api-key-file", metavar="FILE", help="File with accepted API keys, one per line."),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        _serve(
            "--cors-origin",
            metavar="ORIGIN",
            help="Web origin that browsers may send requests from. *: any. Repeatable.",
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        _serve(
            "--served-model-name",
            metavar="NAME",
            help="Name that clients use for the model instead of its own. Repeatable.",
        ),
    ] = None
    any_model: Annotated[bool, _serve("--any-model", help="Accept any model name in requests.")] = (
        _DEFAULTS.accepts_any_model
    )
    max_body_mb: Annotated[
        int,
        _serve("--max-body-mb", metavar="MIB", help="Maximum size of a request body, in MiB.",
               min=1),
    ] = _DEFAULTS.max_body_bytes >> 20  # fmt: skip
    max_batch_queries: Annotated[
        int,
        _serve("--max-batch-queries", metavar="N", help="Maximum number of queries in a request.",
               min=1),
    ] = _DEFAULTS.max_batch_queries  # fmt: skip
    max_queue: Annotated[
        int,
        _serve(
            "--max-queue",
            metavar="N",
            help="Maximum number of unfinished queries. Requests beyond it get status 503.",
            min=1,
        ),
    ] = _DEFAULTS.max_queue
    request_timeout: Annotated[
        float,
        _serve(
            "--request-timeout",
            metavar="SECONDS",
            help="Time limit for a request, in seconds. Requests beyond it get status 504.",
            min=1,
        ),
    ] = _DEFAULTS.request_timeout_s
    drain_timeout: Annotated[
        float,
        _serve(
            "--drain-timeout",
            metavar="SECONDS",
            help="How long a stopping server may take to finish running requests, in seconds.",
            min=0,
        ),
    ] = _DEFAULTS.drain_timeout_s
    log_format: Annotated[
        Literal["plain", "json"],
        _serve("--log-format", metavar="FORMAT", help="Format of log lines."),
    ] = "plain"
    log_prompts: Annotated[
        bool, _serve("--log-prompts", help="Include prompts in the access log.")
    ] = _DEFAULTS.log_prompts

    def settings(self, defaults: QueryDefaults, engine: EngineSettings) -> ServerSettings:
        """The server settings that these options stand for.

        Args:
            defaults: values for fields that queries leave out.
            engine: settings of the model that answers.

        Raises:
            UsageError: an option is invalid, or two contradict each other.
            InputError: the file of API keys cannot be used.
        """
        is_default = self.max_batch_queries == _DEFAULTS.max_batch_queries
        if self.max_batch_queries > self.max_queue and not is_default:
            raise UsageError("--max-batch-queries must not exceed --max-queue")
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            keys += _read_keys(self.api_key_file)
        if not all(keys):
            raise UsageError("--api-key must not be empty")
        names = tuple(dict.fromkeys(self.served_model_name or ()))
        for name in names:
            require_utf8("--served-model-name", name)
            if not name.strip("/ "):
                raise UsageError("--served-model-name must not be empty")
        for origin in self.cors_origin or ():
            if not ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"--cors-origin {origin!r} is not an origin; "
                    "use a form like https://example.org, or *"
                )
        return ServerSettings(
            host=self.host,
            port=self.port,
            defaults=defaults,
            engine=engine,
            api_keys=tuple(keys),
            cors_origins=tuple(self.cors_origin or ()),
            max_body_bytes=self.max_body_mb << 20,
            max_batch_queries=min(self.max_batch_queries, self.max_queue),
            max_queue=self.max_queue,
            request_timeout_s=self.request_timeout,
            drain_timeout_s=self.drain_timeout,
            log_prompts=self.log_prompts,
            model_names=names,
            accepts_any_model=self.any_model,
        )


_BATCH_DEFAULTS = BatchApiSettings(Path())
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What /v1/files and /v1/batches may store, and where."""

    batches: Annotated[
        bool,
        _stored("--batches/--no-batches", help="Whether to offer /v1/files and /v1/batches."),
    ] = True
    batch_dir: Annotated[
        Path | None,
        _stored(
            "--batch-dir",
            metavar="DIR",
            help="Directory for files and batches. Default: ~/.cache/smolcli/batches, or batches "
            "in SMOL_HOME.",
        ),
    ] = None
    max_file_mb: Annotated[
        int,
        _stored("--max-file-mb", metavar="MIB", help="Maximum size of an uploaded file, in MiB.",
                min=1),
    ] = _BATCH_DEFAULTS.max_file_bytes >> 20  # fmt: skip
    batch_quota_mb: Annotated[
        int,
        _stored(
            "--batch-quota-mb",
            metavar="MIB",
            help="Maximum size of all files and results together, in MiB.",
            min=1,
        ),
    ] = _BATCH_DEFAULTS.max_total_bytes >> 20
    max_file_requests: Annotated[
        int,
        _stored("--max-file-requests", metavar="N", help="Maximum number of requests in a file.",
                min=1),
    ] = _BATCH_DEFAULTS.max_requests  # fmt: skip
    max_open_batches: Annotated[
        int,
        _stored("--max-open-batches", metavar="N", help="Maximum number of unfinished batches.",
                min=1),
    ] = _BATCH_DEFAULTS.max_open  # fmt: skip
    batch_retention_days: Annotated[
        int,
        _stored(
            "--batch-retention-days",
            metavar="N",
            help="How long files and finished batches are kept, in days.",
            min=1,
        ),
    ] = _BATCH_DEFAULTS.retention_s // _DAY_S

    def settings(self, seed: int | None) -> BatchApiSettings | None:
        """The settings that these options stand for; None without batches.

        Args:
            seed: the value of `--seed`.

        Raises:
            UsageError: options contradict each other.
        """
        if not self.batches:
            if self.batch_dir is not None:
                raise UsageError("--batch-dir and --no-batches cannot be combined")
            return None
        return BatchApiSettings(
            folder=(self.batch_dir or smol_home() / "batches").absolute(),
            is_required=self.batch_dir is not None,
            max_file_bytes=self.max_file_mb << 20,
            max_total_bytes=self.batch_quota_mb << 20,
            max_requests=self.max_file_requests,
            max_open=self.max_open_batches,
            retention_s=self.batch_retention_days * _DAY_S,
            seed=seed,
        )


@with_option_groups
def serve(
    *,
    ctx: typer.Context,
    options: ServeOptions,
    storage: BatchOptions,
    generation: GenerationOptions,
    schema: Schema = None,
    engine: EngineOptions,
    dedupe: Dedupe = True,
    remote: UpstreamOptions,
) -> None:
    """Serve the model over HTTP.

    Routes: /chat, /chat/batched, an OpenAI-compatible API under /v1 with files and batches, and a
    chat page at /.
    """
    from smolcli.backends.dedup import deduplicated
    from smolcli.server.access_log import configure_logging
    from smolcli.server.wsgi import serve as serve_http

    upstream = remote.settings(ctx, engine.settings())
    defaults = generation.query_defaults(answers=read_schema(schema))
    settings = options.settings(defaults, engine.settings())
    if not settings.api_keys:
        _reject_empty_keys(ctx)
    settings = replace(settings, batches=storage.settings(generation.seed))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    log_to_stderr()
    configure_logging(options.log_format)
    open_backend = ctx.obj or backend_opener(None)
    if upstream is not None:
        settings = replace(settings, is_gateway=True)
        upstream = replace(upstream, timeout_s=settings.request_timeout_s)
        open_backend = functools.partial(_open_gateway, upstream)
    serve_http(settings, deduplicated(open_backend) if dedupe else open_backend)


def _open_gateway(remote: RemoteSettings, settings: EngineSettings) -> "Backend":
    from smolcli.backends.remote.backend import open_gateway

    return open_gateway(remote)


def _reject_empty_keys(ctx: typer.Context) -> None:
    """Reject API keys that are set but empty: empty variables, and an empty list in a config file.

    Raises:
        UsageError: naming the variable or the option.
    """
    if is_given(ctx, "api_key"):
        raise UsageError("--api-key must not be empty")
    for variable in map(variable_of, ("--api-key", "--api-key-file")):
        if variable in os.environ:
            raise UsageError(
                f"the environment variable {variable} must not be blank; "
                "unset it to serve without API keys"
            )


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as exc:
        raise InputError(f"cannot read API keys from {path}: {error_reason(exc)}") from exc
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise InputError(f"{path} contains no API keys; write one per line")
    return keys
