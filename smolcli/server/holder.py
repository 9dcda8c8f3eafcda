"""The backend from before it is loaded until it is closed."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from smolcli.backends.base import Backend, Health
from smolcli.errors import BackendError
from smolcli.server.admission import unavailable
from smolcli.types import Message, Query, Sampling

logger = logging.getLogger(__name__)

WARM_UP = Query("warm-up", (Message("user", "Hello"),), Sampling(max_new_tokens=2))
WARM_UP_S = 120.0
CLOSE_S = 10.0


class Holder:
    """Opens the backend on a thread of its own, while the server answers already.

    Args:
        open_backend: loads the model.
        warms_up: whether it is to answer once before it is offered to clients.
    """

    def __init__(self, open_backend: Callable[[], Backend], warms_up: bool = True) -> None:
        self._open_backend = open_backend
        self._warms_up = warms_up
        self._backend: Backend | None = None
        self._thread = threading.Thread(target=self._load, name="smol-load", daemon=True)
        self.error: Exception | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is a backend that can be asked now."""
        return self._backend is not None and self._backend.health().is_ready

    @property
    def backend(self) -> Backend:
        """What answers.

        Raises:
            HttpError: 503 while it is being loaded.
        """
        if self._backend is None:
            raise unavailable("the model is being loaded; ask again in a moment")
        return self._backend

    def health(self) -> Health | None:
        """How the backend is, None while there is none."""
        return self._backend.health() if self._backend else None

    def identity(self) -> dict[str, Any]:
        """What decides its answers, and how many queries keep it busy; nothing while unknown."""
        identity = self._backend.identity() if self._backend else {}
        return identity | {"window": self._backend.window} if self._backend and identity else {}

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def close(self) -> None:
        """Let go of the model; whoever still waits for an answer learns that it is gone."""
        self._thread.join(CLOSE_S)
        if self._backend:
            self._backend.close()

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            backend = self._open_backend()
            self._backend = _warm(backend) if self._warms_up else backend
            if self._warms_up:
                logger.info("model loaded in %.1f s", time.perf_counter() - started)
        except Exception as exc:
            self.error = exc


def _warm(backend: Backend) -> Backend:
    """Let a backend answer once, so that the first client does not wait for what is done once."""
    try:
        warm = backend.submit(WARM_UP).result(WARM_UP_S)
        if warm.is_error:
            raise BackendError(f"the model cannot answer: {warm.error}")
    except BaseException:
        backend.close()
        raise
    return backend
