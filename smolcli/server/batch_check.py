"""Checks a file of requests before a batch begins.

An invalid line fails the whole batch, as it does at OpenAI. What is wrong inside the body of a
request is that request's own error.
"""

from collections.abc import Callable, Iterator

from smolcli.batch.chat_ids import ChatIds
from smolcli.data.rows import Row
from smolcli.errors import QueryError
from smolcli.protocol.json_text import shorten
from smolcli.protocol.line_formats import OPENAI
from smolcli.server.batch_store import BatchError
from smolcli.server.errors import HttpCode, HttpError
from smolcli.settings import RowSettings
from smolcli.types import ErrorCode

ROWS = RowSettings(input_format="openai")


class FileCheck:
    """Checks the lines of one file.

    Args:
        endpoint: the batch's endpoint, which every request must use.
        max_requests: maximum number of requests in a file.
        check_model: raises HttpError if the server does not use this name for its model.
    """

    def __init__(
        self, endpoint: str, max_requests: int, check_model: Callable[[str], None]
    ) -> None:
        self._endpoint = endpoint
        self._max_requests = max_requests
        self._check_model = check_model
        self._ids = ChatIds()
        self.num_requests = 0
        self.model: str | None = None

    def errors(self, rows: Iterator[Row]) -> Iterator[BatchError]:
        """Yield what is wrong with the rows."""
        for row in rows:
            self.num_requests += 1
            if self.num_requests > self._max_requests:
                message = f"the file has more than {self._max_requests:,} requests"
                yield BatchError(HttpCode.TOO_LARGE, message, row.number)
                return
            try:
                self._check(row)
            except (QueryError, HttpError) as exc:
                yield BatchError(exc.code, str(exc), row.number, exc.field)
        if not self.num_requests:
            yield BatchError("empty_file", "the file has no requests")

    def _check(self, row: Row) -> None:
        if row.error is not None:
            raise row.error
        request = OPENAI.request(row.value)
        if request.url != self._endpoint:
            message = f"url is {request.url}, but the endpoint of the batch is {self._endpoint}"
            raise QueryError(message, ErrorCode.INVALID_VALUE, "url")
        if not self._ids.claim(request.custom_id):
            message = (
                f"custom_id {shorten(request.custom_id)!r} was already used on an earlier line"
            )
            raise QueryError(message, ErrorCode.DUPLICATE_CHAT_ID, "custom_id")
        name = request.body.get("model")
        if isinstance(name, str):
            self._check_name(name)

    def _check_name(self, name: str) -> None:
        try:
            self._check_model(name)
        except HttpError as exc:
            raise HttpError(exc.status, str(exc), exc.code, "body.model") from exc
        if self.model is None:
            self.model = name
        elif name != self.model:
            message = f"model is {shorten(name)!r}, but an earlier line has {shorten(self.model)!r}"
            raise QueryError(
                f"{message}; a file may use one name only", ErrorCode.INVALID_VALUE, "body.model"
            )
