"""OpenAI's API for files and batches: /v1/files and /v1/batches."""

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar, get_args

from flask import Blueprint, Response, request, send_file
from pydantic import BaseModel, ConfigDict, Field
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser

from smolcli.data.compression import LONGEST_MAGIC, codec_of_bytes
from smolcli.errors import QueryError, RunError, SmolError, UsageError, error_reason
from smolcli.protocol.fields import FLOAT_TO_INT, Lenient, Text
from smolcli.protocol.json_text import shorten
from smolcli.protocol.line_formats import RequestFields
from smolcli.protocol.parameters import validated
from smolcli.server.admission import unavailable
from smolcli.server.batch_store import (
    BATCH_ID,
    ENDINGS,
    FILE_ID,
    Batch,
    BatchStore,
    StoredFile,
    Upload,
    no_file,
)
from smolcli.server.batch_worker import BatchWorker
from smolcli.server.errors import HttpCode, HttpError
from smolcli.server.metrics import BatchTotals
from smolcli.server.service import Service, json_response, read_json
from smolcli.types import ErrorCode

logger = logging.getLogger(__name__)

ENDPOINTS: tuple[str, ...] = get_args(RequestFields.model_fields["url"].annotation)
MAX_FORM_BYTES = 1 << 20  # of an upload's form without the file, and of what is parsed at once
MAX_FORM_PARTS = 16
MAX_BATCH_PAGE, MAX_FILE_PAGE = 100, 10_000
MIN_LIFETIME_S, MAX_LIFETIME_S = 3600, 30 * 86_400

_ENDPOINT = " or ".join(ENDPOINTS)
_LIFETIME = f"an integer from {MIN_LIFETIME_S} to {MAX_LIFETIME_S}"
_HOURS_OR_DAYS = re.compile(r"([1-9][0-9]{0,3})([hd])")
_SECONDS = {"h": 3600, "d": 86_400}
_TIMED_STATUSES = ("in_progress", "finalizing", "cancelling", *ENDINGS)


class OutputExpiry(BaseModel):
    """How long the results of a batch are kept."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(strict=True, ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S), FLOAT_TO_INT]


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(strict=True, max_length=512)]


class BatchFields(Lenient):
    """A request for a batch; descriptions complete "<parameter> must be ..."."""

    input_file_id: Text = Field(description="the id of a file with the purpose batch")
    endpoint: Annotated[str, Field(json_schema_extra={"enum": list(ENDPOINTS)})] = Field(
        description=_ENDPOINT
    )
    completion_window: Annotated[str, Field(pattern=f"^{_HOURS_OR_DAYS.pattern}$")] = Field(
        description='"24h", or another number of hours or days such as "7d"'
    )
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = Field(
        None,
        description="an object of up to 16 strings of at most 512 characters, with keys of at most "
        "64",
    )
    output_expires_after: OutputExpiry | None = Field(
        None, description=f'an object with "anchor": "created_at" and seconds, {_LIFETIME}'
    )


class BatchApi:
    """The batch store and its worker, which open when they are first needed.

    Args:
        service: the server's settings and shared state.

    Raises:
        UsageError: another server uses a folder that is required.
        RunError: a folder that is required cannot be used.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings = service.settings.batches
        self._lock = threading.Lock()
        self._store: BatchStore | None = None
        self._worker: BatchWorker | None = None
        self._is_stopped = False
        service.metrics.watch_batches(self._totals)
        if self._settings is not None and self._settings.is_required:
            self._store = BatchStore(self._settings)

    def start(self) -> None:
        """Continue unfinished batches, if any; a folder that is not required may be unusable."""
        if self._settings is None or not self._settings.folder.exists():
            return
        with suppress(HttpError):
            self.open()

    def stop(self) -> None:
        """Interrupt the running batch, which the next server continues; returns at once."""
        self._is_stopped = True
        if self._worker is not None:
            self._worker.stop()

    def close(self) -> None:
        """Stop, wait for work in progress, and let another server use the folder."""
        self.stop()
        with self._lock:
            if self._worker is not None:
                self._worker.stop()
                self._worker.close()
            elif self._store is not None:
                self._store.close()

    def open(self) -> tuple[BatchStore, BatchWorker]:
        """The store and its worker.

        Raises:
            HttpError: they are disabled or cannot be used.
        """
        if self._settings is None:
            message = "files and batches are disabled on this server"
            raise HttpError(HTTPStatus.NOT_FOUND, message, HttpCode.NOT_FOUND)
        with self._lock:
            if self._is_stopped:
                raise unavailable("the server is shutting down; retry later")
            if self._store is None:
                try:
                    self._store = BatchStore(self._settings)
                except SmolError as exc:
                    logger.warning("files and batches are not available: %s", exc)
                    raise _store_unavailable(exc) from exc
            if self._worker is None:
                self._worker = BatchWorker(self._store, self._service)
                self._worker.start()
            return self._store, self._worker

    def _totals(self) -> BatchTotals:
        store, worker = self._store, self._worker
        if store is None or worker is None:
            return BatchTotals()
        unfinished = [worker.current(batch) for batch in store.batches() if batch.is_open]
        return BatchTotals(
            Counter(batch.status for batch in unfinished),
            sum(b.num_requests - b.num_completed - b.num_failed for b in unfinished),
            store.used_bytes,
        )


def _store_unavailable(exc: SmolError) -> HttpError:
    """Report that the store cannot be opened, without the server's paths."""
    is_in_use = isinstance(exc, UsageError)
    reason = "another server uses the directory" if is_in_use else "the directory cannot be used"
    return unavailable(f"files and batches are not available: {reason}")


def batch_routes(api: BatchApi) -> Blueprint:
    """The routes under /v1/files and /v1/batches."""
    routes = Blueprint("batches", __name__, url_prefix="/v1")
    _add_file_routes(routes, api)
    _add_batch_routes(routes, api)
    return routes


def _add_file_routes(routes: Blueprint, api: BatchApi) -> None:
    @routes.post("/files")
    def create_file() -> Response:
        with _storage():
            store, _ = api.open()
            return json_response(file_object(_receive(store)))

    @routes.get("/files")
    def list_files() -> Response:
        store, _ = api.open()
        purpose = request.args.get("purpose") or None
        files = [file for file in store.files() if purpose in (None, file.purpose)]
        if is_newest_first := _choice("order", ("desc", "asc")) == "desc":
            files.reverse()
        rest = _after(store, FILE_ID, files, is_newest_first=is_newest_first)
        return json_response(_page(rest, file_object, MAX_FILE_PAGE, MAX_FILE_PAGE))

    @routes.get("/files/<file_id>")
    def get_file(file_id: str) -> Response:
        return json_response(file_object(_file(api, file_id)))

    @routes.get("/files/<file_id>/content")
    def get_content(file_id: str) -> Response:
        store, _ = api.open()
        with _storage():
            file, content = store.open_content(file_id)
            response = send_file(
                content,
                "application/octet-stream",
                as_attachment=True,
                download_name=file.filename,
                conditional=False,
                etag=False,
                max_age=0,
            )
            response.content_length = os.fstat(content.fileno()).st_size
            return response

    @routes.delete("/files/<file_id>")
    def delete_file(file_id: str) -> Response:
        store, _ = api.open()
        with _storage():
            store.delete_file(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})


def _add_batch_routes(routes: Blueprint, api: BatchApi) -> None:
    @routes.post("/batches")
    def create_batch() -> Response:
        store, worker = api.open()
        fields = parse_batch(read_json())
        if (file := store.file(fields.input_file_id)) is None:
            raise no_file(fields.input_file_id, "input_file_id")
        if file.purpose != "batch":
            message = f"{file.id} has the purpose {file.purpose}, but input_file_id requires batch"
            raise QueryError(message, ErrorCode.INVALID_VALUE, "input_file_id")
        with _storage():
            batch = store.add_batch(lambda id_, now_ns: _new_batch(fields, id_, now_ns))
        worker.wake()
        return json_response(batch_object(batch, worker))

    @routes.get("/batches")
    def list_batches() -> Response:
        store, worker = api.open()
        rest = _after(store, BATCH_ID, store.batches()[::-1], is_newest_first=True)
        return json_response(
            _page(rest, lambda batch: batch_object(batch, worker), 20, MAX_BATCH_PAGE)
        )

    @routes.get("/batches/<batch_id>")
    def get_batch(batch_id: str) -> Response:
        _, worker = api.open()
        return json_response(batch_object(_batch(api, batch_id), worker))

    @routes.post("/batches/<batch_id>/cancel")
    def cancel_batch(batch_id: str) -> Response:
        _, worker = api.open()
        batch = _batch(api, batch_id)
        if not batch.is_open and batch.status != "cancelled":
            message = f"cannot cancel {batch.id}: it is {batch.status} already"
            raise HttpError(HTTPStatus.BAD_REQUEST, message, HttpCode.BAD_REQUEST, "batch_id")
        return json_response(batch_object(worker.cancel(batch.id), worker))


def parse_batch(value: object) -> BatchFields:
    """Validate the body of a request for a batch.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    endpoint = value.get("endpoint") if isinstance(value, dict) else None
    if isinstance(endpoint, str) and endpoint not in ENDPOINTS:
        message = f"endpoint {shorten(endpoint)!r} is not supported in batches; use {_ENDPOINT}"
        raise QueryError(message, ErrorCode.INVALID_VALUE, "endpoint")
    return validated(BatchFields, value)


def _new_batch(fields: BatchFields, batch_id: str, created_ns: int) -> Batch:
    window = _HOURS_OR_DAYS.fullmatch(fields.completion_window)
    assert window is not None
    expiry = fields.output_expires_after
    return Batch(
        id=batch_id,
        input_file_id=fields.input_file_id,
        endpoint=fields.endpoint,
        completion_window=fields.completion_window,
        expires_at=created_ns // 10**9 + int(window[1]) * _SECONDS[window[2]],
        created_ns=created_ns,
        metadata=fields.metadata,
        output_lifetime_s=expiry.seconds if expiry else None,
    )


def file_object(file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI's clients read it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(batch: Batch, worker: BatchWorker) -> dict[str, Any]:
    """A batch as OpenAI's clients read it, with its current counts and what it waits for.

    Args:
        batch: the batch.
        worker: answers it.
    """
    batch = worker.current(batch)
    errors = [
        {"code": error.code, "message": error.message, "param": error.param, "line": error.line}
        for error in batch.errors
    ]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": None if batch.is_open else batch.output_file_id,
        "error_file_id": None if batch.is_open else batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{status}_at": batch.reached_at.get(status) for status in _TIMED_STATUSES},
        "request_counts": {
            "total": batch.num_requests,
            "completed": batch.num_completed,
            "failed": batch.num_failed,
        },
        "usage": {
            "input_tokens": batch.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": batch.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.prompt_tokens + batch.completion_tokens,
        },
        "metadata": batch.metadata,
        "waits_for": worker.waits_for(batch),
    }


def _file(api: BatchApi, file_id: str) -> StoredFile:
    file = api.open()[0].file(file_id)
    if file is None:
        raise no_file(file_id, "file_id")
    return file


def _batch(api: BatchApi, batch_id: str) -> Batch:
    batch = api.open()[0].batch(batch_id)
    if batch is None:
        message = f"no batch with the id {shorten(batch_id)!r}"
        raise HttpError(HTTPStatus.NOT_FOUND, message, HttpCode.NOT_FOUND, "batch_id")
    return batch


# Uploads


def _receive(store: BatchStore) -> StoredFile:
    """Store the file of the current request, which is a form."""
    if request.mimetype != "multipart/form-data":
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "a file must be sent as multipart/form-data with the fields purpose and file",
            HttpCode.UNSUPPORTED_MEDIA_TYPE,
        )
    with ExitStack() as stack:

        def start(**_: object) -> Upload:
            return stack.enter_context(closing(store.upload()))

        form, files = _parse_form(start)
        lifetime_s = _check_form(form)
        if set(files) != {"file"} or len(files.getlist("file")) > 1:
            raise QueryError("the form must have exactly one file, in the field file", field="file")
        upload: Upload = files["file"].stream
        if upload.num_bytes == 0:
            raise QueryError("the file is empty", field="file")
        if codec := codec_of_bytes(upload.head(LONGEST_MAGIC)):
            message = f"the file is compressed ({codec.name}); upload plain JSON lines"
            raise QueryError(message, field="file")
        return upload.keep(files["file"].filename or "", "batch", lifetime_s)


def _parse_form(start: Callable[..., Upload]) -> tuple[Any, Any]:
    parser = FormDataParser(
        start,  # type: ignore[arg-type]
        max_form_memory_size=MAX_FORM_BYTES,
        max_form_parts=MAX_FORM_PARTS,
        silent=False,
    )
    try:
        _, form, files = parser.parse(
            request.stream, request.mimetype, request.content_length, request.mimetype_params
        )
    except RequestEntityTooLarge as exc:
        message = "the form has too many fields or too long a text field; send the file as a file"
        raise HttpError(exc.code, message, HttpCode.TOO_LARGE) from exc
    except ValueError as exc:
        message = "the body is not valid multipart/form-data, or incomplete"
        if "boundary" not in request.mimetype_params:
            message = "Content-Type names no boundary; leave this header to the HTTP client"
        raise HttpError(HTTPStatus.BAD_REQUEST, message, HttpCode.BAD_REQUEST) from exc
    return form, files


_FORM_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


def _check_form(form: Any) -> int | None:
    """Check the fields of an upload; returns how long to keep the file, if that is stated."""
    for name in form:
        if name == "file":
            message = "the form sends file as text; send it as a file, as curl -F file=@PATH does"
            raise QueryError(message, field="file")
        if name not in _FORM_FIELDS:
            raise QueryError(
                f"{shorten(name)} is not supported", ErrorCode.UNKNOWN_FIELD, shorten(name)
            )
    if not (purpose := form.get("purpose")):
        raise QueryError(
            "purpose is required and must be batch", ErrorCode.MISSING_FIELD, "purpose"
        )
    if purpose != "batch":
        raise QueryError(
            f"purpose must be batch: {shorten(purpose)!r} is not supported", field="purpose"
        )
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor not in (None, "created_at"):
        name = "expires_after[anchor]"
        raise QueryError(f"{name} must be created_at", field=name)
    if seconds is None:
        return None
    return _integer("expires_after[seconds]", seconds, MIN_LIFETIME_S, MAX_LIFETIME_S)


# Lists


R = TypeVar("R", StoredFile, Batch)


def _after(store: BatchStore, id_pattern: str, items: list[R], *, is_newest_first: bool) -> list[R]:
    """The items that follow the one that the query string names in `after`, if any.

    That one may have been deleted: clients read a list page by page and delete what they read.
    """
    if not (after := request.args.get("after")):
        return items
    cursor_ns = store.created_ns(after) if re.fullmatch(id_pattern, after) else None
    if cursor_ns is None:
        message = f"after {shorten(after)!r} is not in this list"
        raise QueryError(message, field="after")
    if is_newest_first:
        return [item for item in items if item.created_ns < cursor_ns]
    return [item for item in items if item.created_ns > cursor_ns]


def _page(
    items: Sequence[Any], to_object: Callable[[Any], dict[str, Any]], default: int, limit: int
) -> dict[str, Any]:
    """One page of a list, as the query string of the current request asks."""
    stated = request.args.get("limit")
    size = default if stated is None else _integer("limit", stated, 1, limit)
    page = [to_object(item) for item in items[:size]]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": size < len(items),
    }


def _integer(name: str, text: str, low: int, high: int) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text) and low <= int(text) <= high:
        return int(text)
    raise QueryError(f"{name} must be an integer from {low} to {high}", field=name)


def _choice(name: str, choices: Sequence[str]) -> str:
    value = request.args.get(name) or choices[0]
    if value not in choices:
        raise QueryError(f"{name} must be {' or '.join(choices)}", field=name)
    return value


@contextmanager
def _storage() -> Iterator[None]:
    """Report failures of the disk without the server's paths."""
    try:
        yield
    except (RunError, OSError) as exc:
        logger.error("%s", exc)
        reason = error_reason(exc.__cause__ or exc)
        raise HttpError(
            HTTPStatus.INSUFFICIENT_STORAGE,
            f"the server's storage failed: {reason}",
            HttpCode.STORAGE_FAILED,
        ) from exc
