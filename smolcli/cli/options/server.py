"""Where a server listens, whom it answers, and how much it takes on."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from smolcli.cli.options import option
from smolcli.cli.options.engine import Dedupe
from smolcli.errors import InputError, UsageError
from smolcli.settings import EngineSettings, QueryDefaults, ServerSettings

_DEFAULTS = ServerSettings()
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#@]+")

_serve = functools.partial(option, panel="Server")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where a server listens, whom it answers, and how much it takes on."""

    host: Annotated[str, _serve("--host", help="Address to listen on.")] = _DEFAULTS.host
    port: Annotated[int, _serve("--port", help="0: any that is free.", least=0, most=65535)] = (
        _DEFAULTS.port
    )
    api_key: Annotated[
        list[str] | None,
        _serve("--api-key", help="A key that clients must send; may be repeated."),
    ] = None
    api_key_file: Annotated[
        Path | None, _serve("--api-key-file", help="A file of such keys, one a line.")
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        _serve("--cors-origin", help="A web origin that may ask, * for any; may be repeated."),
    ] = None
    max_body_mb: Annotated[
        int, _serve("--max-body-mb", help="The largest request body, in MiB.", least=1)
    ] = _DEFAULTS.max_body_bytes >> 20
    max_batch_queries: Annotated[
        int, _serve("--max-batch-queries", help="The most queries of one request.", least=1)
    ] = _DEFAULTS.max_batch_queries
    max_queue: Annotated[
        int,
        _serve("--max-queue", help="The most queries taken on at once; more get 503.", least=1),
    ] = _DEFAULTS.max_queue
    request_timeout: Annotated[
        float, _serve("--request-timeout", help="Seconds until a request gets 504.", least=1)
    ] = _DEFAULTS.request_timeout_s
    drain_timeout: Annotated[
        float, _serve("--drain-timeout", help="Seconds to finish in when stopped.", least=0)
    ] = _DEFAULTS.drain_timeout_s
    dedupe: Dedupe = True
    log_format: Annotated[
        Literal["plain", "json"], _serve("--log-format", help="How log lines look.")
    ] = "plain"
    log_prompts: Annotated[bool, _serve("--log-prompts", help="Log what is asked, too.")] = (
        _DEFAULTS.log_prompts
    )

    def settings(self, defaults: QueryDefaults, engine: EngineSettings) -> ServerSettings:
        """These options as settings.

        Raises:
            UsageError: where two of them contradict each other.
            InputError: where the file of keys cannot be used.
        """
        if self.max_batch_queries > self.max_queue:
            raise UsageError("--max-queue must be as large as --max-batch-queries, or larger")
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            keys += _read_keys(self.api_key_file)
        if not all(keys):
            raise UsageError("an --api-key must not be empty")
        for origin in self.cors_origin or ():
            if not ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"--cors-origin {origin!r} is no origin like https://example.org, nor *"
                )
        return ServerSettings(
            host=self.host,
            port=self.port,
            defaults=defaults,
            engine=engine,
            api_keys=tuple(keys),
            cors_origins=tuple(self.cors_origin or ()),
            max_body_bytes=self.max_body_mb << 20,
            max_batch_queries=self.max_batch_queries,
            max_queue=self.max_queue,
            request_timeout_s=self.request_timeout,
            drain_timeout_s=self.drain_timeout,
            log_prompts=self.log_prompts,
        )


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as exc:
        raise InputError(f"the API keys in {path} cannot be read: {exc}") from exc
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise InputError(f"{path} holds no API key; write one on each line")
    return keys
