"""Parsing of JSON text: strictly what users write, and leniently what programs have written."""

import codecs
import json
import math
import sys
from typing import Any, NoReturn

from smolcli.errors import QueryError
from smolcli.types import ErrorCode

MAX_DEPTH = 64  # nested arrays and objects
MAX_SHOWN = 100  # characters of a user's text that an error message quotes


def shorten(text: str) -> str:
    """Truncate text from a user, for an error message."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def load_json(text: bytes) -> object:
    """Parse one I-JSON value (RFC 7493): no NaN, no infinities, no duplicate keys, no lone
    surrogates. A byte order mark is dropped: joined files have some in the middle.

    Raises:
        QueryError: with code `invalid_json`, saying what is wrong and where.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        value: object = _DECODER.decode(text.decode())
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as exc:
        _reject_json(f"not UTF-8: byte {exc.start + 1} is 0x{text[exc.start]:02x}", exc)
    except UnicodeEncodeError as exc:
        _reject_json("a string contains a lone surrogate (\\ud800 to \\udfff)", exc)
    except json.JSONDecodeError as exc:
        line = f"line {exc.lineno}, " if exc.lineno > 1 else ""
        _reject_json(f"{exc.msg.removesuffix(' at')} at {line}column {exc.colno}", exc)
    except RecursionError as exc:
        _reject_json(f"nested more than {MAX_DEPTH} levels deep", exc)
    except ValueError as exc:
        reason = str(exc)
        if "integer string conversion" in reason:  # Python's own limit
            max_digits = sys.get_int_max_str_digits()
            reason = f"Exceeds the limit of {max_digits:,} digits for an integer"
        _reject_json(reason, exc)
    return value


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does, but report excessive nesting as a ValueError, too.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse text that a program has written and that holds one JSON object; see `parse_json`.

    Raises:
        ValueError: it does not hold one.
    """
    try:
        value = parse_json(text)
    except ValueError as exc:
        raise ValueError(f"it is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ValueError("it does not contain a JSON object")
    return value


def _reject_json(reason: str, cause: Exception) -> NoReturn:
    raise QueryError(f"invalid JSON: {reason}", ErrorCode.INVALID_JSON) from cause


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {shorten(next(k for k in keys if keys.count(k) > 1))!r}")
    return values


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _depth(value: object) -> int:
    """How many levels of arrays and objects a value nests."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list) and v]:
        depth += 1
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
    return depth


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_reject_constant, parse_float=_finite
)
