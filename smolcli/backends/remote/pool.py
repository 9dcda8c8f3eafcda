"""The servers together: who is up, who is next, and what they all are."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from smolcli.backends.remote.http import Unavailable, check_status
from smolcli.backends.remote.upstream import Upstream
from smolcli.backends.remote.wire import Kind, Nonsense, load_object
from smolcli.errors import BackendError
from smolcli.settings import RemoteSettings

LOOK_AGAIN_S = 5.0
POLL_S = 0.02
WINDOW_BATCHES = 3  # as the local backend has it
BATCH_SIZE = 64  # of a server that does not tell
DECIDING = ("api", "model", "revision", "dtype", "system_prompt")

logger = logging.getLogger(__name__)


class Pool:
    """Servers that answer alike; belongs to the event loop of its backend.

    Args:
        upstreams: at least one.
        settings: what they are expected to be.
        is_pinned: whether they may never become another model.
    """

    def __init__(
        self, upstreams: list[Upstream], settings: RemoteSettings, is_pinned: bool
    ) -> None:
        self.upstreams = upstreams
        self.identity: dict[str, Any] = {}
        self._settings = settings
        self._is_pinned = is_pinned

    @property
    def is_up(self) -> bool:
        """Whether any of them answers."""
        return any(upstream.is_up for upstream in self.upstreams)

    @property
    def is_hopeless(self) -> bool:
        """Whether no waiting will help with any of them."""
        return all(upstream.is_hopeless for upstream in self.upstreams)

    @property
    def reason(self) -> str:
        """Why nobody answers."""
        return "; ".join(upstream.reason for upstream in self.upstreams)

    @property
    def window(self) -> int:
        """How many unfinished queries keep all of them busy."""
        least = max(WINDOW_BATCHES * BATCH_SIZE, 2 * self._settings.max_concurrency)
        return sum(upstream.window or least for upstream in self.upstreams)

    @property
    def num_at_once(self) -> int:
        """How many queries all of them compute at once."""
        return self.window // WINDOW_BATCHES

    async def choose(self, give_up_at: float) -> Upstream:
        """The one with the fewest queries before it, as soon as any may be asked.

        Raises:
            BackendError: nobody may be, until then or for too long already.
        """
        while True:
            now = time.monotonic()
            ready = [upstream for upstream in self.upstreams if upstream.is_ready]
            if ready and now < give_up_at:
                return min(ready, key=lambda upstream: len(upstream.jobs))
            if now >= min(give_up_at, self._lost_at()):
                raise BackendError(self.reason)
            await asyncio.sleep(POLL_S)

    async def watch(self, upstream: Upstream) -> None:
        """Look after one of them, for ever."""
        while True:
            await self._look(upstream)
            upstream.fell.clear()
            try:
                wait_s = LOOK_AGAIN_S if upstream.is_up else upstream.rest_s
                async with asyncio.timeout(wait_s):
                    await upstream.fell.wait()
                await asyncio.sleep(upstream.rest_s)
            except TimeoutError:
                pass

    def _lost_at(self) -> float:
        """When it is enough, all of them being down."""
        if self.is_up:
            return float("inf")
        return max(u.down_since for u in self.upstreams) + self._settings.retry_s

    async def _look(self, upstream: Upstream) -> None:
        was_up = upstream.is_up
        try:
            self._admit(upstream, await self._identify(upstream))
        except (Unavailable, BackendError, Nonsense) as exc:
            if not (was_up or self._is_pinned or str(exc) == upstream.reason):
                logger.warning("not up: %s", exc)  # the log of a gateway is all that tells
            upstream.fall(str(exc), is_hopeless=not isinstance(exc, Unavailable))
            return
        upstream.rise()
        if not was_up:
            logger.info("up: %s", upstream.url)

    async def _identify(self, upstream: Upstream) -> dict[str, Any]:
        """What it is, for the manifest, from what it has at /ready and /v1/models."""
        await _check_ready(upstream)
        response = await upstream.get("/v1/models")
        check_status(response, upstream.url)
        if response.status_code != 200:
            if self._settings.api == "openai":
                raise BackendError(f"{upstream.url} has no /v1/models")
            upstream.kind = Kind.PLAIN
            return {"api": Kind.PLAIN, "model": "unknown", "revision": None, "dtype": None}
        listed = self._listed(upstream, load_object(response.content))
        upstream.model = listed["id"]
        told = listed.get("smol") or ({} if self._settings.api == "smol" else None)
        if isinstance(told, dict) and self._settings.api != "openai":
            upstream.kind = Kind.SMOL
            upstream.window = _window(told)
            return {"model": listed["id"]} | {k: v for k, v in told.items() if k != "window"}
        upstream.kind = Kind.OPENAI
        return {"api": Kind.OPENAI, "model": listed["id"], "revision": None, "dtype": None}

    def _listed(self, upstream: Upstream, body: Mapping[str, Any]) -> dict[str, Any]:
        """The one of its models that is wanted, or else its first."""
        models = body.get("data")
        if not isinstance(models, list) or not all(_is_model(model) for model in models):
            raise Nonsense(f"{upstream.url} lists no models")
        if not models:
            raise BackendError(f"{upstream.url} has no model yet")
        return next((m for m in models if m["id"] == self._settings.model), dict(models[0]))

    def _admit(self, upstream: Upstream, identity: dict[str, Any]) -> None:
        """Take one in that is as expected, and as the others."""
        for name, wanted in (("model", self._settings.model), ("dtype", self._settings.dtype)):
            if wanted not in (None, "auto", identity.get(name)) and identity.get(name):
                _refuse(upstream, name, identity[name], wanted)
        others_are_up = any(u.is_up for u in self.upstreams if u is not upstream)
        if not self.identity or not (self._is_pinned or others_are_up):
            self.identity = identity
        for name in DECIDING:
            if identity.get(name) != self.identity.get(name):
                _refuse(upstream, name, identity.get(name), self.identity.get(name))


def _refuse(upstream: Upstream, name: str, value: object, wanted: object) -> NoReturn:
    raise BackendError(f"{upstream.url} has the {name} {value!r}, not {wanted!r}")


def _is_model(model: object) -> bool:
    return isinstance(model, dict) and isinstance(model.get("id"), str)


def _window(told: Mapping[str, Any]) -> int:
    window = told.get("window")
    return window if isinstance(window, int) and window >= WINDOW_BATCHES else 0


async def _check_ready(upstream: Upstream) -> None:
    """Ask a server like this one whether it takes work; a full one does, and others have no word.

    Raises:
        Unavailable: it does not.
    """
    response = await upstream.get("/ready")
    try:
        status = load_object(response.content).get("status")
    except Nonsense:
        return
    if response.status_code == 503 and status != "full":
        raise Unavailable(f"{upstream.url} is not ready: {status}")
