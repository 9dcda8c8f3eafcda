"""What every answer is to be."""

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from smolcli.cli.options import option
from smolcli.errors import QueryError, UsageError
from smolcli.types import AnswerFormat

Schema = Annotated[
    str | None,
    option(
        "--schema",
        help="A JSON Schema that every answer follows: a file, or a pydantic model module:Class.",
        panel="Generation",
    ),
]


def read_format(schema: str | None) -> AnswerFormat | None:
    """The format that --schema means; None without one.

    Raises:
        UsageError: where there is no such schema, or answers cannot be held to it.
    """
    if schema is None:
        return None
    from smolcli.protocol.query import schema_format  # late: imports pydantic
    from smolcli.text.grammar import check_format

    definition = _read_model(schema) if _names_model(schema) else _read_file(Path(schema))
    try:
        check_format(answers := schema_format(definition))
    except QueryError as exc:
        raise UsageError(f"--schema {schema}: {exc}") from exc
    return answers


def _names_model(schema: str) -> bool:
    module, _, name = schema.partition(":")
    is_dotted = all(part.isidentifier() for part in module.split("."))
    return is_dotted and name.isidentifier() and not Path(schema).exists()


def _read_model(schema: str) -> dict[str, Any]:
    """The schema of a pydantic model, or of what else pydantic can describe."""
    from pydantic import TypeAdapter

    module, _, name = schema.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as python -m has it, unlike a console script
    try:
        return TypeAdapter(getattr(importlib.import_module(module), name)).json_schema()
    except Exception as exc:  # whatever the module does
        reason = " ".join(str(exc).split())[:200]
        raise UsageError(f"--schema {schema}: {type(exc).__name__}: {reason}") from exc
    finally:
        sys.path.remove(str(Path.cwd()))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        definition = json.loads(path.read_bytes())
    except OSError as exc:
        raise UsageError(f"--schema {path} cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise UsageError(f"--schema {path} is not valid JSON: {exc}") from exc
    if not isinstance(definition, dict):
        raise UsageError(f"--schema {path} does not hold a JSON object")
    return definition
