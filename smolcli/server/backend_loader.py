"""Opens the backend while the server already accepts connections."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from smolcli.backends.base import Backend, Counters, Health
from smolcli.errors import BackendError, ModelError, SmolError
from smolcli.server.admission import unavailable
from smolcli.types import Message, Query, Sampling

logger = logging.getLogger(__name__)

WARM_UP = Query("warm-up", (Message("user", "Hello"),), Sampling(max_new_tokens=2))
WARM_UP_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 10.0


class BackendLoader:
    """Opens the backend on its own thread, while the server already accepts connections.

    Args:
        open_backend: opens the backend.
        warms_up: whether the backend must answer a query before clients may use it.
    """

    def __init__(self, open_backend: Callable[[], Backend], warms_up: bool) -> None:
        self._open_backend = open_backend
        self._warms_up = warms_up
        self._backend: Backend | None = None
        self._warm_up_counters = Counters()
        self._thread = threading.Thread(target=self._load, name="smol-load", daemon=True)
        self.error: SmolError | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the backend is loaded and can answer now."""
        return self._backend is not None and self._backend.health().is_ready

    @property
    def backend(self) -> Backend:
        """The loaded backend.

        Raises:
            HttpError: 503 while it is loading.
        """
        if self._backend is None:
            raise unavailable("the model is loading; retry later")
        return self._backend

    def health(self) -> Health | None:
        """The health of the backend, None while it is loading."""
        return self._backend.health() if self._backend else None

    def counters(self) -> Counters:
        """The backend's totals, without its warm-up query."""
        return self._backend.counters() - self._warm_up_counters if self._backend else Counters()

    def identity(self) -> dict[str, Any]:
        """The backend's identity and window, empty while they are unknown."""
        identity = self._backend.identity() if self._backend else {}
        return identity | {"window": self._backend.window} if self._backend and identity else {}

    def start(self) -> None:
        """Start loading."""
        self._thread.start()

    def close(self) -> None:
        """Close the backend; queries that are still running fail with `backend_error`."""
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._backend:
            self._backend.close()

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            backend = self._open_backend()
            if self._warms_up:
                _warm_up(backend)
                self._warm_up_counters = backend.counters()
                logger.info("model loaded in %.1f s", time.perf_counter() - started)
            self._backend = backend
        except SmolError as exc:
            self.error = exc
        except BaseException as exc:  # including a Rust panic, which is not an Exception
            logger.error("cannot load the model", exc_info=exc)
            self.error = ModelError(
                "cannot load the model because of an internal error; see the log for details"
            )


def _warm_up(backend: Backend) -> None:
    """Answer a query, so that the first client does not pay for one-time initialization."""
    try:
        result = backend.submit(WARM_UP).result(WARM_UP_TIMEOUT_S)
        if result.field == "messages":  # the model's chat template rejects them, or it has none
            text = replace(WARM_UP, messages=(), raw_prompt="Hello")
            result = backend.submit(text).result(WARM_UP_TIMEOUT_S)
        if result.is_error:
            raise BackendError(f"the model failed its warm-up query: {result.error}")
    except BaseException:
        backend.close()
        raise
