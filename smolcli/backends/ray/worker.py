"""The worker process on a node of the cluster: one engine, and the model's files."""

import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from smolcli.backends.base import Backend, Counters
from smolcli.errors import ModelError
from smolcli.settings import EngineSettings, ResolvedDtype
from smolcli.types import Query, Result
from smolcli.weights.resolve import on_disk
from smolcli.weights.store import ModelFiles, install, locked_scratch, stored

LINGER_S = 0.05  # how long to collect results for one reply, to reduce the number of calls


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Facts that the driver checks before it uses a worker."""

    node: str
    dtype: ResolvedDtype
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """One query, numbered by the driver."""

    number: int
    query: Query
    is_interactive: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """Results finished since the last reply, by number, and the worker's totals."""

    results: list[tuple[int, Result]]
    counters: Counters


class Worker:
    """Answers queries for a driver that calls one method at a time."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._unfinished: dict[int, Future[Result]] = {}
        self._finished: SimpleQueue[int] = SimpleQueue()

    def info(self, settings: EngineSettings) -> NodeInfo:
        """Versions on this node, and the dtype that the settings select on it."""
        from smolcli.backends.local import versions  # late: loads the engine
        from smolcli.engine.autoconfig import resolve_dtype

        return NodeInfo(platform.node(), resolve_dtype(settings), versions())

    def open(
        self,
        settings: EngineSettings,
        files: ModelFiles,
        names: Sequence[str] = (),
        *contents: bytes,
    ) -> dict[str, Any] | None:
        """Load the model.

        Args:
            settings: the driver's, fully resolved.
            files: the driver's model; this node must use the same revision.
            names: names of the model's files, if they are sent along.
            contents: contents of these files.

        Returns:
            The backend's identity, or None if this node does not have the model and no files
            were sent.
        """
        from smolcli.backends.local import open_local  # late: loads the engine

        sent = dict(zip(names, contents, strict=True))
        found = store_sent_model(files, sent) if names else _find(files)
        if found is None:
            return None
        self._backend = open_local(settings, found)
        return self._backend.identity()

    def exchange(self, tasks: Sequence[Task], cancelled: Sequence[int]) -> Reply:
        """Accept new queries, cancel others, and return what has finished.

        Raises:
            BackendError: the engine is gone.
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
        deadline = time.monotonic() + LINGER_S
        with suppress(Empty):
            while self._unfinished and (left := deadline - time.monotonic()) > 0:
                number = self._finished.get(timeout=left)
                if number in self._unfinished:
                    results.append((number, self._unfinished.pop(number).result()))
        return results


def store_sent_model(files: ModelFiles, contents: Mapping[str, bytes]) -> ModelFiles:
    """Put a model that was sent to this machine into its store, once.

    Args:
        files: the sender's model.
        contents: its files, by name.

    Returns:
        The model in this machine's store.
    """
    name = _name_in_store(files)
    with locked_scratch(name) as scratch:
        found = stored(name) or _write(replace(files, model=name), contents, scratch)
    return replace(files, folder=found.folder)


def _write(files: ModelFiles, contents: Mapping[str, bytes], scratch: Path) -> ModelFiles:
    folder = scratch / "model"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return install(replace(files, folder=folder), {}, scratch)


def _find(files: ModelFiles) -> ModelFiles | None:
    """The driver's model on this node: under the same name, or sent earlier."""
    with suppress(ModelError):  # a path on the driver's machine means nothing here
        found = on_disk(files.model)
        if found is not None and found.revision == files.revision:
            return replace(files, folder=found.folder)
    sent = stored(_name_in_store(files))
    return replace(files, folder=sent.folder) if sent else None


def _name_in_store(files: ModelFiles) -> str:
    return f"shipped--{files.revision}"
