"""What is told of each request when it is over: one line in the log."""

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


def log_requests(kind: Literal["plain", "json"]) -> None:
    """Let through what the server says, in the shape that `--log-format` names."""
    shape = JsonFormatter() if kind == "json" else PlainFormatter("%(asctime)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(shape)
    logging.getLogger("smolcli.server").setLevel(logging.INFO)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it waits where smol refuses


class PlainFormatter(logging.Formatter):
    """The message, and a record's `fields` after it as name=value."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_shown(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


class JsonFormatter(logging.Formatter):
    """One object: time, level, message, a record's `fields`, and the traceback if there is one."""

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


def _shown(value: object) -> str:
    """On one line, whatever a client put into it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


@dataclass(slots=True)
class Trace:
    """One request, from its arrival until its last byte is handed to the socket."""

    request_id: str
    log_prompts: bool
    started_at: float = field(default_factory=time.perf_counter)
    status: int = 0
    error_code: str | None = None
    num_queries: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None  # of the query that waited longest
    first_token_s: float | None = None  # of the query that was first
    prompts: list[str] = field(default_factory=list)

    def ask(self, queries: Iterable[Query]) -> None:
        """Note what is asked, where that is wanted."""
        if self.log_prompts:
            self.prompts += [query.messages[-1].content for query in queries]

    def add(self, result: Result) -> None:
        """Count one result."""
        self.num_queries += 1
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
        """What there is to tell, in a fixed order."""
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        values: dict[str, object] = {"status": self.status, "request_id": self.request_id}
        if self.num_queries:
            values |= {"queries": self.num_queries, "failed": self.num_failed} | tokens
        values |= {
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


def current_trace() -> Trace:
    """The trace of the request that this thread serves."""
    trace: Trace = g.trace
    return trace


def trace_requests(app: Flask, log_prompts: bool) -> None:
    """Give each request an id, the client's own where it sent one, and log it when it is over."""

    @app.before_request
    def begin() -> None:
        sent = request.headers.get("X-Request-Id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        g.trace = Trace(request_id, log_prompts)

    @app.after_request
    def end(response: Response) -> Response:
        trace, method, path = current_trace(), request.method, quote(request.path)
        trace.status = response.status_code
        response.headers["X-Request-Id"] = trace.request_id
        response.call_on_close(lambda: _log(trace, method, path))
        return response


def _log(trace: Trace, method: str, path: str) -> None:
    logger.info("%s %s", method, path, extra={"fields": trace.fields()})
