"""`smol serve`: the same pipeline over HTTP."""

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import typer

from smolcli.cli.commands import log_to_stderr, open_local
from smolcli.cli.options import grouped
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.generation import GenerationOptions
from smolcli.cli.options.remote import UpstreamOptions
from smolcli.cli.options.schema import Schema, read_format
from smolcli.cli.options.server import ServeOptions
from smolcli.settings import EngineSettings, RemoteSettings

if TYPE_CHECKING:
    from smolcli.backends.base import Backend

SWITCH_INTERVAL_S = 0.0005  # the engine's thread waits no longer for those of the requests

EXAMPLES = "[bold]smol serve[/bold] answers at http://127.0.0.1:8000, where there is a page, too."


@grouped
def serve(
    *,
    ctx: typer.Context,
    schema: Schema = None,
    generation: GenerationOptions,
    engine: EngineOptions,
    remote: UpstreamOptions,
    options: ServeOptions,
) -> None:
    """Answer over HTTP: /chat, /chat/batched, OpenAI's API under /v1, and a page."""
    from smolcli.backends.dedup import deduplicated
    from smolcli.server.access_log import configure_logging
    from smolcli.server.wsgi import serve as serve_http

    upstream = remote.settings(engine.settings())
    defaults = generation.query_defaults(answers=read_format(schema))
    settings = options.settings(defaults, engine.settings())
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    log_to_stderr()
    configure_logging(options.log_format)
    open_backend = ctx.obj or open_local
    if upstream is not None:
        settings = replace(settings, is_gateway=True)
        upstream = replace(upstream, timeout_s=settings.request_timeout_s)
        open_backend = partial(_open_gateway, upstream)
    serve_http(settings, deduplicated(open_backend) if options.dedupe else open_backend)


def _open_gateway(remote: RemoteSettings, settings: EngineSettings) -> "Backend":
    from smolcli.backends.remote.backend import open_gateway

    return open_gateway(remote)
