"""The batch store: uploaded files, batches and their results, in one folder.

    .lock           held by the server that uses the folder
    files/ID        the content of a file
    files/ID.json   its record, written before the content gets its name
    batches/ID.json the record of a batch
    batches/ID/     its results while it is unfinished

A file exists if its content does, so that a kill or power loss at any instant leaves either
all of it or nothing.
"""

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Literal, TypeVar, get_args

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter

from smolcli.atomic import replacing, sync_folder
from smolcli.errors import RunError, UsageError, error_reason
from smolcli.server.errors import HttpCode, HttpError
from smolcli.settings import BatchApiSettings

logger = logging.getLogger(__name__)

MAX_FILES = 10_000
MAX_REMOVED = 100_000  # deleted files and batches whose place in their list is remembered
RESULTS_DIVISOR = 4  # uploads leave 1/4 of the quota for results
MAX_NAME = 255  # characters of a file's name

Purpose = Literal["batch", "batch_output"]
Ending = Literal["completed", "failed", "expired", "cancelled"]
Status = Literal["validating", "in_progress", "finalizing", "cancelling"] | Ending

ENDINGS: tuple[Ending, ...] = get_args(Ending)

FILE_ID, BATCH_ID = "^file-[0-9a-f]{24}$", "^batch_[0-9a-f]{24}$"
FileId = Annotated[str, Field(pattern=FILE_ID)]
BatchId = Annotated[str, Field(pattern=BATCH_ID)]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file, as recorded next to its content; times without a unit are in seconds since 1970."""

    id: FileId
    filename: str
    purpose: Purpose
    num_bytes: int
    created_ns: int
    expires_at: int

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def created_at(self) -> int:
        """When it was stored."""
        return self.created_ns // 10**9


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch failed; `line` and `param` locate it in the input file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, as recorded; times without a unit are in seconds since 1970.

    Args:
        id: the batch's id.
        input_file_id: the file of requests.
        endpoint: the endpoint of all its requests.
        completion_window: as requested.
        expires_at: when unfinished requests are given up.
        created_ns: when it was created, in nanoseconds.
        metadata: as requested.
        output_lifetime_s: how long its result files are kept; None means the store's retention.
        status: as clients see it.
        ending: the final status, once the results are being published.
        reached_at: when it reached each status.
        model: the name of the model that its requests use, if any.
        num_requests: requests in the file; 0 until they are counted.
        num_completed: requests that were answered.
        num_failed: requests that failed.
        prompt_tokens: prompt tokens of all answers.
        completion_tokens: completion tokens of all answers.
        errors: why it failed.
        output_file_id: the answers, once `ending` is known and if there are any.
        error_file_id: the failed requests, likewise.
    """

    id: BatchId
    input_file_id: FileId
    endpoint: str
    completion_window: str
    expires_at: int
    created_ns: int
    metadata: dict[str, str] | None = None
    output_lifetime_s: int | None = None
    status: Status = "validating"
    ending: Ending | None = None
    reached_at: dict[str, int] = field(default_factory=dict)
    model: str | None = None
    num_requests: int = 0
    num_completed: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: tuple[BatchError, ...] = ()
    output_file_id: FileId | None = None
    error_file_id: FileId | None = None

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def created_at(self) -> int:
        """When it was created."""
        return self.created_ns // 10**9

    @property
    def is_open(self) -> bool:
        """Whether it is unfinished."""
        return self.status not in ENDINGS

    def with_status(self, status: Status) -> "Batch":
        """The batch with a new status that it has reached now."""
        reached_at = self.reached_at | {status: int(time.time())}
        return replace(self, status=status, reached_at=reached_at)


class Upload:
    """A file being uploaded. It counts towards the quota from its first byte.

    The caller must call `close`, which discards the file unless it was kept.

    Args:
        store: the store to add the file to.
        path: where its content is until then.
    """

    def __init__(self, store: "BatchStore", path: Path) -> None:
        self._store = store
        self._path = path
        self._is_kept = False
        self.num_bytes = 0
        with _trying_to("store"):
            self._file = path.open("xb")

    def write(self, data: bytes) -> int:
        """Append data.

        Raises:
            HttpError: 413 if the file or the store becomes too large.
            RunError: the disk is full or cannot be written.
        """
        self._store.reserve(len(data), self.num_bytes)
        self.num_bytes += len(data)
        with _trying_to("store"):
            return self._file.write(data)

    def seek(self, offset: int) -> None:
        """Accept the rewind that ends the upload of a form."""

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        with _trying_to("store"):
            self._file.flush()
            with self._path.open("rb") as file:
                return file.read(num_bytes)

    def keep(self, filename: str, purpose: Purpose, lifetime_s: int | None = None) -> StoredFile:
        """Add the file to the store.

        Args:
            filename: its name, for people.
            purpose: what it is for.
            lifetime_s: how long to keep it; None means the store's retention.

        Raises:
            HttpError: 413 if the store has too many files.
            RunError: the disk is full or cannot be written.
        """
        with _trying_to("store"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        record = self._store.add_file(self._path, filename, purpose, lifetime_s=lifetime_s)
        self._is_kept = True
        return record

    def close(self) -> None:
        """Discard the file unless it was kept."""
        if not self._is_kept:
            with suppress(OSError):  # a full disk may fail to flush
                self._file.close()
            with suppress(OSError):
                self._path.unlink()
            self._store.release(self.num_bytes)


class BatchStore:
    """Files and batches on disk, for one server at a time. Every method is thread-safe.

    Args:
        settings: the folder and its limits.

    Raises:
        UsageError: another server uses the folder.
        RunError: the folder cannot be used.
    """

    def __init__(self, settings: BatchApiSettings) -> None:
        self.settings = settings
        self._files_folder = settings.folder / "files"
        self._batches_folder = settings.folder / "batches"
        self._lock = threading.RLock()
        self._files: dict[str, StoredFile] = {}
        self._batches: dict[str, Batch] = {}
        self._removed_ns: dict[str, int] = {}  # when they were created; the oldest removal first
        self._used_bytes = 0
        self._last_ns = 0  # when the newest record was created
        self._result_bytes: dict[str, int] = {}  # of unfinished batches
        self._file_lock = FileLock(settings.folder / ".lock", thread_local=False)
        self._acquire()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another server use the folder."""
        self._file_lock.release()

    @property
    def used_bytes(self) -> int:
        """The size of all files and results."""
        with self._lock:
            return self._used_bytes + sum(self._result_bytes.values())

    # Files

    def upload(self) -> Upload:
        """Begin an upload, which the caller must close."""
        return Upload(self, self._files_folder / f".{secrets.token_hex(12)}.part")

    def reserve(self, num_bytes: int, num_before: int = 0) -> None:
        """Count bytes towards the quota.

        Args:
            num_bytes: number of bytes to count.
            num_before: number of bytes already counted for the same file.

        Raises:
            HttpError: 413 if the file or the store becomes too large.
        """
        limit, quota = self.settings.max_file_bytes, self.settings.max_total_bytes
        if num_before + num_bytes > limit:
            message = f"the file is larger than the limit of {limit:,} bytes"
            raise HttpError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, HttpCode.TOO_LARGE, "file"
            )
        with self._lock:
            if self.used_bytes + num_bytes > quota - quota // RESULTS_DIVISOR:
                raise _quota_exceeded(
                    f"the file would fill this server's quota of {quota:,} bytes, a quarter of "
                    "which is reserved for results"
                )
            self._used_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Stop counting bytes of a file that was discarded."""
        with self._lock:
            self._used_bytes -= num_bytes

    def add_file(
        self,
        path: Path,
        filename: str,
        purpose: Purpose,
        *,
        file_id: str | None = None,
        lifetime_s: int | None = None,
    ) -> StoredFile:
        """Move a file into the store; its size counts towards the quota already.

        Args:
            path: the file, which is in the store's folder.
            filename: its name, for people.
            purpose: what it is for.
            file_id: its id; None creates one.
            lifetime_s: how long to keep it; None means the store's retention.

        Raises:
            HttpError: 413 if there are too many files.
            RunError: the file cannot be moved.
        """
        now_ns = self._now_ns()
        lifetime_s = self.settings.retention_s if lifetime_s is None else lifetime_s
        with self._lock, _trying_to("store"):
            if len(self._files) >= MAX_FILES and purpose == "batch":
                raise _quota_exceeded(f"this server has {MAX_FILES:,} files, which is the limit")
            record = StoredFile(
                id=file_id or new_id("file-"),
                filename=_CONTROL.sub("", re.split(r"[/\\]", filename)[-1])[:MAX_NAME] or "upload",
                purpose=purpose,
                num_bytes=path.stat().st_size,
                created_ns=now_ns,
                expires_at=now_ns // 10**9 + lifetime_s,
            )
            self._save(self._files_folder, record)
            path.replace(self.content_path(record.id))
            sync_folder(self._files_folder)
            self._files[record.id] = record
        return record

    def open_content(self, file_id: str) -> tuple[StoredFile, BinaryIO]:
        """Open a file, which then stays readable if it is deleted.

        Raises:
            HttpError: 404 if it does not exist.
            RunError: it cannot be read.
        """
        with self._lock:
            if (record := self.file(file_id)) is None:
                raise no_file(file_id, "file_id")
            try:
                with _trying_to("read"):
                    return record, self.content_path(file_id).open("rb")
            except RunError as exc:
                if self.is_deleted(file_id):
                    raise no_file(file_id, "file_id") from exc
                raise

    def content_path(self, file_id: str) -> Path:
        """Where the content of a file is; the id must come from a record."""
        return self._files_folder / file_id

    def is_deleted(self, file_id: str) -> bool:
        """Whether the content of a file was deleted by hand; False if the disk cannot tell."""
        try:
            return file_id not in os.listdir(self._files_folder)
        except OSError:
            return False

    def file(self, file_id: str) -> StoredFile | None:
        """Find a file; None if it does not exist or has expired."""
        record = self._files.get(file_id)
        return record if record and record.expires_at > time.time() else None

    def files(self) -> list[StoredFile]:
        """All files that have not expired, oldest first."""
        with self._lock:
            found = [file for file_id in self._files if (file := self.file(file_id))]
        return sorted(found, key=lambda file: file.created_ns)

    def delete_file(self, file_id: str) -> None:
        """Delete a file.

        Raises:
            HttpError: 404 if it does not exist, 400 if an unfinished batch needs it.
            RunError: it cannot be deleted.
        """
        with self._lock:
            if self.file(file_id) is None:
                raise no_file(file_id, "file_id")
            if user := self._user_of(file_id):
                message = (
                    f"{file_id} is the input of {user.id}, which is {user.status}; "
                    "cancel the batch first"
                )
                raise HttpError(HTTPStatus.BAD_REQUEST, message, HttpCode.BAD_REQUEST, "file_id")
            self._remove_file(file_id)

    def _remove_file(self, file_id: str) -> None:
        with _trying_to("delete"):
            self.content_path(file_id).unlink(missing_ok=True)
        file = self._files.pop(file_id)
        self._used_bytes -= file.num_bytes
        self._remember(file)
        _discard(self._record_path(self._files_folder, file_id))  # means nothing without content

    def _user_of(self, file_id: str) -> Batch | None:
        users = (b for b in self._batches.values() if b.input_file_id == file_id and b.is_open)
        return next(users, None)

    # Batches

    def add_batch(self, make: Callable[[str, int], Batch]) -> Batch:
        """Add a batch.

        Args:
            make: makes the batch from its id and its time of creation in nanoseconds.

        Raises:
            HttpError: 429 if there are too many unfinished batches, 404 if its input is gone.
            RunError: it cannot be stored.
        """
        with self._lock:
            limit = self.settings.max_open
            if sum(batch.is_open for batch in self._batches.values()) >= limit:
                message = f"this server has {limit:,} unfinished batches, which is the limit"
                raise HttpError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"{message}; wait for one to finish, or cancel one",
                    HttpCode.QUOTA_EXCEEDED,
                )
            batch = make(new_id("batch_"), self._now_ns())
            if self.file(batch.input_file_id) is None:
                raise no_file(batch.input_file_id, "input_file_id")
            self._save(self._batches_folder, batch)
            self._batches[batch.id] = batch
        return batch

    def batch(self, batch_id: str) -> Batch | None:
        """Find a batch; None if it does not exist."""
        return self._batches.get(batch_id)

    def batches(self) -> list[Batch]:
        """All batches, oldest first."""
        with self._lock:
            return sorted(self._batches.values(), key=lambda batch: batch.created_ns)

    def update(
        self, batch_id: str, change: Callable[[Batch], Batch], *, must_store: bool = False
    ) -> Batch:
        """Change a batch.

        Args:
            batch_id: the batch's id.
            change: maps the current batch to the changed one.
            must_store: whether a change that cannot be stored is not made; otherwise it holds
                until the server stops.

        Raises:
            RunError: the change cannot be stored, but must be.
        """
        with self._lock:
            old = self._batches[batch_id]
            new = change(old)
            if new != old:
                try:
                    self._save(self._batches_folder, new)
                except RunError as exc:
                    if must_store:
                        raise
                    logger.error("batch %s: %s", batch_id, exc)
            self._batches[batch_id] = new
        return new

    def results_folder(self, batch_id: str) -> Path:
        """The folder for the results of an unfinished batch; the id must come from a record.

        Raises:
            RunError: it cannot be created.
        """
        folder = self._batches_folder / batch_id
        with _trying_to("store"):
            folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def remove_results(self, batch_id: str) -> None:
        """Remove the results of a finished batch, which have been published."""
        shutil.rmtree(self._batches_folder / batch_id, ignore_errors=True)
        with self._lock:
            self._result_bytes.pop(batch_id, None)

    def count_results(self, batch_id: str, num_bytes: int) -> None:
        """Count the results of an unfinished batch towards the quota.

        Raises:
            HttpError: 413 if the store becomes too large.
        """
        with self._lock:
            self._result_bytes[batch_id] = num_bytes
            if self.used_bytes > (quota := self.settings.max_total_bytes):
                raise _quota_exceeded(f"the results exceed the server's quota of {quota:,} bytes")

    def publish(self, batch: Batch, path: Path, file_id: str, filename: str) -> None:
        """Move a file of results to the files that clients can read; may be repeated.

        Args:
            batch: the batch that it belongs to.
            path: the file of results; if it is missing, it has already been moved.
            file_id: id for the new file.
            filename: its name, for people.

        Raises:
            RunError: it cannot be moved.
        """
        with self._lock, _trying_to("store"):
            if path.exists():
                num_old = self._files[file_id].num_bytes if file_id in self._files else 0
                record = self.add_file(
                    path,
                    filename,
                    "batch_output",
                    file_id=file_id,
                    lifetime_s=batch.output_lifetime_s,
                )
                self._used_bytes += record.num_bytes - num_old

    def sweep(self) -> None:
        """Delete expired files, and batches that finished longer ago than the retention.

        What cannot be deleted is reported and kept for the next time, except for the record of a
        file whose content is gone, which the next start of the store deletes.
        """
        now = time.time()
        with self._lock:
            for file in list(self._files.values()):
                if file.expires_at <= now and not self._user_of(file.id):
                    try:
                        self._remove_file(file.id)
                    except RunError as exc:
                        logger.warning("%s", exc)
            for batch in list(self._batches.values()):
                ended_at = max(batch.reached_at.values(), default=0)
                is_old = not batch.is_open and ended_at + self.settings.retention_s <= now
                if is_old and _discard(self._record_path(self._batches_folder, batch.id)):
                    self._remember(self._batches.pop(batch.id))

    # Lists

    def created_ns(self, record_id: str) -> int | None:
        """When a file or batch was created, also if it was deleted since the store was opened.

        None if it is unknown. A client that deletes what a page lists continues after an id that
        no longer exists.
        """
        with self._lock:
            record = self._files.get(record_id) or self._batches.get(record_id)
            return record.created_ns if record else self._removed_ns.get(record_id)

    def _remember(self, removed: StoredFile | Batch) -> None:
        self._removed_ns[removed.id] = removed.created_ns
        if len(self._removed_ns) > MAX_REMOVED:
            del self._removed_ns[next(iter(self._removed_ns))]

    # The folder

    def _acquire(self) -> None:
        folder = self.settings.folder
        try:
            for path in (folder, self._files_folder, self._batches_folder):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file_lock.acquire(timeout=0)
        except Timeout as exc:
            raise UsageError(
                f"another server uses {folder}; choose another directory with --batch-dir"
            ) from exc
        except OSError as exc:
            raise RunError(
                f"cannot store batches in {folder}: {error_reason(exc)}; "
                "choose another --batch-dir, or --no-batches"
            ) from exc

    def _load(self) -> None:
        with _trying_to("read"):
            self._load_files()
            for _, batch in _records(self._batches_folder, Batch):
                self._batches[batch.id] = batch
            records: list[StoredFile | Batch] = [*self._files.values(), *self._batches.values()]
            self._last_ns = max((record.created_ns for record in records), default=0)
            for folder in self._batches_folder.iterdir():
                owner = self._batches.get(folder.name)
                if folder.is_dir() and owner is not None and not owner.is_open:
                    shutil.rmtree(folder, ignore_errors=True)  # the results have been published
                elif folder.is_dir():
                    sizes = (path.stat().st_size for path in folder.iterdir())
                    self._result_bytes[folder.name] = sum(sizes)

    def _load_files(self) -> None:
        for path in self._files_folder.glob(".*"):  # of interrupted uploads
            _discard(path)
        for path, file in _records(self._files_folder, StoredFile):
            try:
                num_bytes = self.content_path(file.id).stat().st_size
            except FileNotFoundError:
                _discard(path)
            else:
                self._files[file.id] = replace(file, num_bytes=num_bytes)
        for content in self._files_folder.iterdir():
            if content.suffix != ".json" and content.is_file():
                self._used_bytes += content.stat().st_size

    def _now_ns(self) -> int:
        """The current time in nanoseconds; no two records have the same one."""
        with self._lock:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            return self._last_ns

    def _save(self, folder: Path, record: StoredFile | Batch) -> None:
        with replacing(self._record_path(folder, record.id)) as file:
            file.write(TypeAdapter(type(record)).dump_json(record, indent=2) + b"\n")

    def _record_path(self, folder: Path, record_id: str) -> Path:
        return folder / f"{record_id}.json"


def new_id(prefix: str) -> str:
    """A new id that nobody can guess."""
    return prefix + secrets.token_hex(12)


def no_file(file_id: str, field: str) -> HttpError:
    """The error for a file that does not exist.

    Args:
        file_id: the id that was requested.
        field: the parameter that names it.
    """
    message = f"no file with the id {file_id[:100]!r}; it may have expired or been deleted"
    return HttpError(HTTPStatus.NOT_FOUND, message, HttpCode.NOT_FOUND, field)


def _quota_exceeded(message: str) -> HttpError:
    return HttpError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"{message}; delete files that are no longer needed",
        HttpCode.QUOTA_EXCEEDED,
        "file",
    )


R = TypeVar("R", StoredFile, Batch)


def _records(folder: Path, kind: type[R]) -> Iterator[tuple[Path, R]]:
    """The records in a folder; damaged ones are reported and left alone."""
    adapter = TypeAdapter(kind)
    for path in sorted(folder.glob("*.json")):
        try:
            record = adapter.validate_json(path.read_bytes())
            if record.id != path.stem:
                raise ValueError(f"it describes {record.id!r}")
        except (OSError, ValueError) as exc:
            reason = str(exc).splitlines()[0]
            logger.warning("ignoring %s, which is damaged: %s", path, reason)
            continue
        yield path, record


def _discard(path: Path) -> bool:
    """Delete a file that is no longer needed; returns whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("cannot delete %s: %s", path, error_reason(exc))
        return False
    return True


@contextmanager
def _trying_to(verb: str) -> Iterator[None]:
    """Raise errors of the disk as ours, which say what failed."""
    try:
        yield
    except OSError as exc:
        where = f" {exc.filename}" if exc.filename else ""
        raise RunError(f"cannot {verb}{where}: {error_reason(exc)}") from exc
