"""The options of `--via` and `--upstream`: which servers answer in this process' stead."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from smolcli.cli.options import option
from smolcli.errors import UsageError
from smolcli.settings import DEFAULT_MODEL, EngineSettings, RemoteSettings

_DEFAULTS = RemoteSettings(urls=())
_remote = functools.partial(option, panel="Other servers")

UpstreamApi = Annotated[
    Literal["auto", "smol", "openai"],
    _remote("--upstream-api", help="What the servers speak; auto: ask them."),
]
RetryFor = Annotated[
    float, _remote("--retry-for", help="Seconds until servers that are down are gone.", least=0)
]


@dataclass(frozen=True, slots=True)
class ViaOptions:
    """Servers that answer instead of a model here; without any, the model is loaded here."""

    via: Annotated[
        list[str] | None,
        _remote("--via", help="URL of a server that answers instead; may be repeated."),
    ] = None
    api_key: Annotated[str | None, _remote("--api-key", help="The key that it wants.")] = None
    upstream_api: UpstreamApi = _DEFAULTS.api
    retry_for: RetryFor = _DEFAULTS.retry_s

    def settings(self, engine: EngineSettings) -> RemoteSettings | None:
        """These options as settings, None where the model is to be loaded here."""
        return _settings(self.via, self.api_key, self.upstream_api, self.retry_for, engine)


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """Model services behind a gateway; without any, the model is loaded here."""

    upstream: Annotated[
        list[str] | None,
        _remote("--upstream", help="URL of a model service that answers; may be repeated."),
    ] = None
    upstream_api_key: Annotated[
        str | None, _remote("--upstream-api-key", help="The key that it wants.")
    ] = None
    upstream_api: UpstreamApi = _DEFAULTS.api
    retry_for: RetryFor = _DEFAULTS.retry_s

    def settings(self, engine: EngineSettings) -> RemoteSettings | None:
        """These options as settings, None where the model is to be loaded here."""
        return _settings(
            self.upstream, self.upstream_api_key, self.upstream_api, self.retry_for, engine
        )


def _settings(
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
    return RemoteSettings(
        urls=tuple(urls),
        api=api,
        api_key=api_key,
        model=None if engine.model == DEFAULT_MODEL else engine.model,
        dtype=engine.dtype,
        max_concurrency=engine.max_concurrency,
        retry_s=retry_s,
    )
