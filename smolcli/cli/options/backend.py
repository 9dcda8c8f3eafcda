"""Options that choose the backend: this process, remote servers, or a Ray cluster."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smolcli.cli.options import option
from smolcli.errors import UsageError
from smolcli.settings import EngineSettings, RaySettings, RemoteSettings

if TYPE_CHECKING:
    from smolcli.backends.base import Backend, OpenBackend

_DEFAULTS = RemoteSettings(urls=())
_remote = functools.partial(option, panel="Remote servers")
_cluster = functools.partial(option, panel="Ray cluster")

UpstreamApi = Annotated[
    Literal["auto", "smol", "openai"],
    _remote(
        "--upstream-api", metavar="API", help="API that the servers implement. auto: detect it."
    ),
]
RetryFor = Annotated[
    float,
    _remote(
        "--retry-for",
        metavar="SECONDS",
        help="How long to keep retrying an unreachable or overloaded server, in seconds.",
        min=0,
    ),
]


@dataclass(frozen=True, slots=True)
class ViaOptions:
    """Remote servers that answer instead of a local model."""

    via: Annotated[
        list[str] | None,
        _remote(
            "--via",
            metavar="URL",
            help="URL of a server to send queries to instead of loading a model. Repeatable.",
        ),
    ] = None
    api_key: Annotated[
        str | None,
        _remote("--api-key", metavar="KEY", help="API key to send to these servers."),
    ] = None
    upstream_api: UpstreamApi = _DEFAULTS.api
    retry_for: RetryFor = _DEFAULTS.retry_s

    def settings(self, ctx: typer.Context, engine: EngineSettings) -> RemoteSettings | None:
        """The remote settings that these options stand for; None without servers."""
        api_key = self.api_key
        if api_key and _source(ctx, "api_key") == "ENVIRONMENT":  # may list the keys of smol serve
            api_key = next(iter(api_key.split()), None)
        return _settings(ctx, self.via, api_key, self.upstream_api, self.retry_for, engine)


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """Model services that a gateway forwards queries to."""

    upstream: Annotated[
        list[str] | None,
        _remote(
            "--upstream",
            metavar="URL",
            help="URL of a model service to forward queries to, which makes this server a "
            "gateway without a model. Repeatable.",
        ),
    ] = None
    upstream_api_key: Annotated[
        str | None,
        _remote("--upstream-api-key", metavar="KEY", help="API key to send to these services."),
    ] = None
    upstream_api: UpstreamApi = _DEFAULTS.api
    retry_for: RetryFor = _DEFAULTS.retry_s

    def settings(self, ctx: typer.Context, engine: EngineSettings) -> RemoteSettings | None:
        """The remote settings that these options stand for; None without upstreams."""
        return _settings(
            ctx, self.upstream, self.upstream_api_key, self.upstream_api, self.retry_for, engine
        )


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Whether to compute in this process or on a Ray cluster."""

    backend: Annotated[
        Literal["local", "ray"],
        _cluster(
            "--backend",
            metavar="BACKEND",
            help="Where to run the model: in this process or on Ray workers.",
        ),
    ] = "local"
    ray_address: Annotated[
        str | None,
        _cluster(
            "--ray-address",
            metavar="ADDRESS",
            help="Address of a running cluster. Starts a local one by default.",
        ),
    ] = None
    ray_workers: Annotated[
        int,
        _cluster(
            "--ray-workers",
            metavar="N",
            help="Number of workers. 0: one per GPU, or one per node without GPUs.",
            min=0,
        ),
    ] = 0
    ray_gpus_per_worker: Annotated[
        float,
        _cluster(
            "--ray-gpus-per-worker",
            metavar="N",
            help="Number of GPUs per worker; may be fractional.",
            min=0,
        ),
    ] = 0.0

    def settings(self) -> RaySettings | None:
        """The Ray settings that these options stand for; None for a local backend."""
        if self.backend != "ray":
            return None
        return RaySettings(self.ray_address, self.ray_workers, self.ray_gpus_per_worker)


def backend_opener(
    remote: RemoteSettings | None, ray: RaySettings | None = None, *, starts_fast: bool = False
) -> "OpenBackend":
    """The function that opens the chosen backend.

    Args:
        remote: servers that answer, if any.
        ray: cluster that answers, if any.
        starts_fast: whether a local backend answers only a few queries.

    Raises:
        UsageError: both are given.
    """
    if remote is not None and ray is not None:
        raise UsageError("--via and --backend ray cannot be combined; choose one of them")

    def open_backend(settings: EngineSettings) -> "Backend":
        if remote is not None:
            from smolcli.backends.remote.backend import open_remote

            return open_remote(remote)
        if ray is not None:
            from smolcli.backends.ray.backend import open_ray

            return open_ray(settings, ray)
        from smolcli.backends.local import open_local

        return open_local(settings, starts_fast=starts_fast)

    return open_backend


def _settings(
    ctx: typer.Context,
    urls: Sequence[str] | None,
    api_key: str | None,
    api: Literal["auto", "smol", "openai"],
    retry_s: float,
    engine: EngineSettings,
) -> RemoteSettings | None:
    if not urls:
        return None
    if len(set(urls)) < len(urls):
        raise UsageError(f"the same URL is given twice: {' '.join(urls)}")
    if engine.chat_template:
        raise UsageError(
            "--chat-template has no effect on other servers, which apply their own templates; "
            "pass it to smol serve there"
        )
    return RemoteSettings(
        urls=tuple(urls),
        api=api,
        api_key=api_key,
        model=engine.model if is_given(ctx, "model") else None,
        dtype=engine.dtype,
        max_concurrency=engine.max_concurrency,
        retry_s=retry_s,
    )


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter was set by its option, environment variable or the config file."""
    return _source(ctx, name) not in (None, "DEFAULT")


def _source(ctx: typer.Context, name: str) -> str | None:
    source = ctx.get_parameter_source(name)
    return None if source is None else source.name
