"""The far side of the Ray backend: one engine in a process of its own, on whatever node."""

import platform
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Literal

from smolcli.backends.base import Backend, Counters
from smolcli.backends.ray.model_files import unpack, unpacked
from smolcli.errors import ModelError
from smolcli.settings import EngineSettings
from smolcli.types import Query, Result
from smolcli.weights.resolve import on_disk
from smolcli.weights.store import ModelFiles

LINGER_S = 0.05  # results of so long share a reply, so that calls stay few


@dataclass(frozen=True, slots=True)
class Facts:
    """What the driver wants to know of a worker before it trusts it."""

    node: str
    dtype: Literal["float32", "bfloat16"]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """One query under a number of the driver's."""

    number: int
    query: Query
    is_interactive: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """What was finished since the last one, by number; what was done in all."""

    results: list[tuple[int, Result]]
    counters: Counters


class Worker:
    """Answers queries for a driver that calls one method at a time."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._unfinished: dict[int, Future[Result]] = {}
        self._finished: SimpleQueue[int] = SimpleQueue()

    def facts(self, settings: EngineSettings) -> Facts:
        """Versions, and what dtype the settings come to here."""
        from smolcli.backends.local import dtype_here, versions  # late: loads torch

        return Facts(platform.node(), dtype_here(settings), versions())

    def open(
        self,
        settings: EngineSettings,
        files: ModelFiles,
        names: Sequence[str] = (),
        *contents: bytes,
    ) -> dict[str, Any] | None:
        """Load the model; returns the backend's identity.

        Args:
            settings: the driver's, nothing left open.
            files: the driver's model, of which this node must have the same revision.
            names: of the model's files, whose `contents` follow.

        Returns None where the node does not have the model and no contents were given.
        """
        from smolcli.backends.local import open_local  # late: loads torch

        found = unpack(files, dict(zip(names, contents, strict=True))) if names else _find(files)
        if found is None:
            return None
        self._backend = open_local(settings, found)
        return self._backend.identity()

    def exchange(self, tasks: Sequence[Task], cancelled: Sequence[int]) -> Reply:
        """Take on queries, let go of others, and hand over what is finished by and by.

        Raises:
            BackendError: where the engine is gone.
        """
        assert self._backend is not None
        for task in tasks:
            self._start(self._backend, task)
        for number in cancelled:
            if number in self._unfinished:
                self._unfinished.pop(number).cancel()
        return Reply(self._collect(), self._backend.counters())

    def _start(self, backend: Backend, task: Task) -> None:
        future = backend.submit(task.query, is_interactive=task.is_interactive)
        self._unfinished[task.number] = future
        future.add_done_callback(lambda _: self._finished.put(task.number))

    def _collect(self) -> list[tuple[int, Result]]:
        results = []
        end = time.monotonic() + LINGER_S
        with suppress(Empty):
            while self._unfinished and (left := end - time.monotonic()) > 0:
                number = self._finished.get(timeout=left)
                if number in self._unfinished:
                    results.append((number, self._unfinished.pop(number).result()))
        return results


def _find(files: ModelFiles) -> ModelFiles | None:
    """The driver's model as this node has it, under the same name or shipped earlier."""
    with suppress(ModelError):  # a path of the driver's means nothing here
        found = on_disk(files.model)
        if found is not None and found.revision == files.revision:
            return replace(files, folder=found.folder)
    return unpacked(files)
