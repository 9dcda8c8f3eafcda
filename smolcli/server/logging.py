"""How log records look: for people, or one JSON object a line."""

import json
import logging
from datetime import UTC, datetime
from typing import Literal


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
