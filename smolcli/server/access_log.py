"""The access log: one line per request, in plain text or JSON."""

import json
import logging
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from flask import Flask, Response, g, request

from smolcli.types import Query, Result

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def configure_logging(log_format: Literal["plain", "json"]) -> None:
    """Enable the server's loggers and set the format of every root handler.

    Args:
        log_format: the value of `--log-format`.
    """
    formatter = (
        JsonFormatter() if log_format == "json" else PlainFormatter("%(asctime)s %(message)s")
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
    logging.getLogger("smolcli.server").setLevel(logging.INFO)
    # Waitress warns about queued tasks, but the admission limit already bounds them.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


class PlainFormatter(logging.Formatter):
    """Formats a record as its message followed by its `fields` as name=value pairs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_one_line(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object: time, level, message, `fields` and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        values |= _fields(record)
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    return fields


def _one_line(value: object) -> str:
    """Escape line breaks in lists, which hold text from clients."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


@dataclass(slots=True)
class AccessRecord:
    """What the access log reports about one request."""

    request_id: str
    log_prompts: bool
    started_at: float = field(default_factory=time.perf_counter)
    status: int = 0
    error_code: str | None = None
    num_queries: int = 0
    num_failed: int = 0
    num_deduplicated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None  # longest of all queries
    first_token_s: float | None = None  # shortest of all queries
    prompts: list[str] = field(default_factory=list)

    def add_prompts(self, queries: Iterable[Query]) -> None:
        """Record the last message or raw prompt of each query if `--log-prompts` is set."""
        if self.log_prompts:
            self.prompts += [query.last_text for query in queries]

    def add_result(self, result: Result) -> None:
        """Add one result to the request's counts, tokens and timings."""
        self.num_queries += 1
        self.num_deduplicated += result.is_deduplicated
        if result.is_error:
            self.num_failed += 1
            self.error_code = self.error_code or str(result.error_code)
        if result.usage:
            self.prompt_tokens += result.usage.prompt_tokens
            self.completion_tokens += result.usage.completion_tokens
        if result.timings:
            self.queue_s = max(self.queue_s or 0.0, result.timings.queue_s)
            first = result.timings.first_token_s
            self.first_token_s = (
                first if self.first_token_s is None else min(self.first_token_s, first)
            )

    def fields(self) -> dict[str, object]:
        """The fields of the log line, without those that do not apply."""
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        values: dict[str, object] = {"status": self.status, "request_id": self.request_id}
        if self.num_queries:
            values |= {"queries": self.num_queries, "failed": self.num_failed} | tokens
        values |= {
            "deduplicated": self.num_deduplicated or None,
            "queue_s": self.queue_s,
            "first_token_s": self.first_token_s,
            "total_s": time.perf_counter() - self.started_at,
            "error_code": self.error_code,
            "prompts": self.prompts or None,
        }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in values.items()
            if value is not None
        }


def current_record() -> AccessRecord:
    """The access record of the request being handled by this thread."""
    record: AccessRecord = g.access_record
    return record


def log_requests(app: Flask, log_prompts: bool) -> None:
    """Log every request once its last byte has been handed to Waitress.

    A valid `X-Request-Id` from the client is kept; otherwise one is generated. Either is sent
    back in the response.
    """

    @app.before_request
    def begin() -> None:
        sent = request.headers.get("X-Request-Id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        g.access_record = AccessRecord(request_id, log_prompts)

    @app.after_request
    def end(response: Response) -> Response:
        record, method, path = current_record(), request.method, quote(request.path)
        record.status = response.status_code
        response.headers["X-Request-Id"] = record.request_id
        response.call_on_close(
            lambda: logger.info("%s %s", method, path, extra={"fields": record.fields()})
        )
        return response
