"""Lines of several files in one output: results carry the name of their file and its line."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Self

from smolcli.protocol.line_formats import BareFormat, LineFormat, RunInfo
from smolcli.settings import QueryDefaults
from smolcli.types import Query, Result

# Rows of several files are numbered in one sequence: the rows of each file begin at a multiple.
ROWS_PER_FILE = 1 << 40


def row_number(file: int, line: int) -> int:
    """The number of a line among the rows of several files.

    Args:
        file: position of the file, counted from 0.
        line: line number in the file.
    """
    return file * ROWS_PER_FILE + line


def place_of(number: int) -> tuple[int, int]:
    """The position of a row's file, and the line number in it: the inverse of `row_number`."""
    return divmod(number, ROWS_PER_FILE)


@dataclass(frozen=True, slots=True)
class ManyFilesFormat(LineFormat):
    """The formats of several files; each line has that of its file.

    A line number that a method receives or returns is a `row_number`.

    Args:
        names: the files' names, in order.
        formats: the format of each file.
        positions: the position of each file, by name.
    """

    names: tuple[str, ...] = ()
    formats: tuple[LineFormat, ...] = ()
    positions: dict[str, int] = field(default_factory=dict)

    name = "many files"
    id_field = "chat_id"

    @classmethod
    def of(cls, formats: dict[str, LineFormat]) -> Self:
        """Combine formats by file name; ids made from line numbers begin with the file name."""
        return cls(
            names=tuple(formats),
            formats=tuple(
                replace(each, id_prefix=f"{name}:") if isinstance(each, BareFormat) else each
                for name, each in formats.items()
            ),
            positions={name: index for index, name in enumerate(formats)},
        )

    def for_run(self, run: RunInfo) -> Self:
        formats = tuple(
            each.for_run(replace(run, run_id=_run_id(run.run_id, name)))
            for name, each in zip(self.names, self.formats, strict=True)
        )
        return replace(self, run=run, formats=formats)

    def for_line(self, line: int) -> LineFormat:
        return self.formats[place_of(line)[0]]

    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        query = self.for_line(line).parse(value, defaults, place_of(line)[1])
        return replace(query, line=line)

    def id_of(self, value: object, line: int) -> str | None:
        return self.for_line(line).id_of(value, place_of(line)[1])

    def resembles(self, value: object) -> bool:
        return any(format.resembles(value) for format in self.formats)

    def record(self, result: Result) -> dict[str, Any]:
        assert result.line is not None
        file, line = place_of(result.line)
        record = self.formats[file].record(replace(result, line=line))
        return _with_file(record, self.names[file])

    def read_back(self, record: dict[str, Any]) -> Result:
        file = self.positions[record["file"]]
        result = self.formats[file].read_back(record)
        assert result.line is not None
        return replace(result, line=row_number(file, result.line))


def _with_file(record: dict[str, Any], name: str) -> dict[str, Any]:
    """A record with the name of its file before the line number, or at the end."""
    members = list(record.items())
    at = list(record).index("line") if "line" in record else len(members)
    return dict([*members[:at], ("file", name), *members[at:]])


def _run_id(run_id: str, name: str) -> str:
    """Part of the ids of OpenAI responses, which contain nothing but the line number otherwise."""
    data = f"{run_id}/{name}".encode(errors="surrogateescape")
    return hashlib.blake2b(data, digest_size=8).hexdigest()
