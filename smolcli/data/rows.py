"""One row of an input, and where the results of a table go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolcli.data.compression import codec_of_name
from smolcli.data.detection import table_suffix
from smolcli.errors import QueryError, UsageError


@dataclass(frozen=True, slots=True)
class LongestField:
    """The longest field of a templated prompt, which is cut if the prompt is too long.

    Args:
        text: of the field.
        render: the prompt with another text in its place.
    """

    text: str
    render: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input.

    Args:
        number: its line number, or its position from 1 where rows have no lines.
        value: its content as a JSON value; the raw bytes of a line that is not valid JSON.
        fault: what is wrong with it, if anything.
        carried: values to copy to the metadata of its result.
        longest: field of its prompt, if that is rendered from a template.
    """

    number: int
    value: object = None
    fault: QueryError | None = None
    carried: Mapping[str, Any] | None = None
    longest: LongestField | None = None


def journal_path(output: Path) -> Path:
    """Where a run writes its results: next to a table, otherwise to the output itself.

    Raises:
        UsageError: for a compressed table.
    """
    if table_suffix(output) is None:
        return output
    if codec_of_name(output) is not None:
        raise UsageError(
            f"{output}: compressed tables cannot be written; leave out {output.suffix}"
        )
    return output.with_name(f"{output.name}.jsonl")
