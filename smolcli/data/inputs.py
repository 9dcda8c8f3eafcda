"""The files that a run reads, as one sequence of rows."""

import glob
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from smolcli.data.compression import without_codec_suffix
from smolcli.data.reader import read_rows, row_numbers
from smolcli.data.remote_files import matching
from smolcli.data.rows import Row
from smolcli.errors import InputError, UsageError, error_reason
from smolcli.protocol.many_files import place_of, row_number
from smolcli.settings import InputFile, RowSettings, RunSettings

# Files that a directory stands for; a .txt file may be a README.
_SUFFIXES = {
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv"),
    *(".parquet", ".arrow", ".feather", ".ipc"),
}
_MANIFEST = ".manifest.json"
_STDIN = re.compile(r"(?<!\S)-(?=[:\s])")  # as a path in an error message


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input files of a run.

    The rows of several files are numbered by `protocol.many_files.row_number`, those of one file by
    their line numbers.

    Args:
        files: the files, in order.
        rows: how rows become queries.
        is_several: whether results carry the name of their file.
    """

    files: tuple[InputFile, ...]
    rows: RowSettings
    is_several: bool

    @classmethod
    def of(cls, settings: RunSettings) -> Self:
        """The inputs of a run."""
        one = (InputFile(settings.input_name or str(settings.input), settings.input),)
        return cls(settings.files or one, settings.rows, bool(settings.files))

    def __str__(self) -> str:
        if len(self.files) == 1:
            return self.files[0].name
        return f"{self.files[0].name} and {len(self.files) - 1:,} more"

    def where(self, number: int) -> str:
        """A row for an error message: `line 5`, or `line 5 of a.jsonl`."""
        if not self.is_several:
            return f"line {number}"
        file, line = place_of(number)
        return f"line {line} of {self.files[file].name}"

    def read(self, after: int = 0) -> Generator[Row]:
        """Yield the rows of all files; see `read_rows`.

        Args:
            after: skip rows up to this number.
        """
        if not self.is_several:
            yield from rows_of(self.files[0], self.rows, after)
            return
        first, line = place_of(after)
        for index, file in enumerate(self.files[first:], start=first):
            start = line if index == first else 0
            with closing(rows_of(file, self.rows, start, id_prefix=f"{file.name}:")) as rows:
                for row in rows:
                    yield replace(row, number=row_number(index, row.number))

    def numbers(self) -> Iterator[int]:
        """The numbers of the rows that `read` yields; see `row_numbers`."""
        for index, file in enumerate(self.files):
            with _errors_of(file):
                for number in row_numbers(file.path, self.rows, file.name):
                    yield row_number(index, number) if self.is_several else number


def rows_of(
    file: InputFile, settings: RowSettings, after: int = 0, id_prefix: str = ""
) -> Generator[Row]:
    """Like `read_rows`, but errors name the file as the user did.

    Args:
        file: the input file.
        settings: see `read_rows`.
        after: see `read_rows`.
        id_prefix: see `read_rows`.
    """
    with _errors_of(file):
        yield from read_rows(file.path, settings, after, id_prefix, file.name)


@contextmanager
def _errors_of(file: InputFile) -> Iterator[None]:
    """Make errors name the file as the user did, not the temporary copy of a remote file."""
    try:
        yield
    except (UsageError, InputError) as exc:
        if str(file.path) == "-":
            message = _STDIN.sub("stdin", str(exc), count=1)
        else:
            message = str(exc).replace(str(file.path), file.name)
        if message == str(exc):
            raise
        raise type(exc)(message) from exc


def are_several(names: Sequence[str]) -> bool:
    """Whether the arguments of a command name several inputs.

    A directory and a pattern do even if they stand for one file now, because they may stand for
    more later.
    """
    return len(names) != 1 or _is_folder(names[0]) or _is_pattern(names[0])


def expanded(names: Iterable[str], written: Iterable[Path]) -> list[str]:
    """The files that paths, directories and patterns name, each once, in the order given.

    A directory stands for the data files in it, and a pattern for all files that match, both sorted
    by name. The results of runs do not count, nor do hidden files in a directory.

    Args:
        names: paths, patterns and URLs.
        written: files that the run writes, whether they exist or not.

    Raises:
        UsageError: a directory or pattern stands for no file.
        InputError: a directory cannot be read.
    """
    own = {os.path.realpath(path) for path in written}
    found: dict[str, str] = {}
    for name in names:
        if "://" in name:
            urls = matching(name) if _is_pattern(name) else [name]
            if not urls:
                raise UsageError(f"no file matches {name!r}")
            found |= {url: url for url in urls if url not in found}
        elif _is_folder(name) or _is_pattern(name):
            for path in _files(name, own):
                found.setdefault(os.path.realpath(path), path)
        else:
            found.setdefault(os.path.realpath(name), name)
    return list(found.values())


def _files(name: str, own: set[str]) -> list[str]:
    if _is_folder(name):
        paths = [path for path in _entries(name) if _suffix(path) in _SUFFIXES]
        missing = f"no data file in {name}: none of its files ends in {' '.join(sorted(_SUFFIXES))}"
        if any(_is_folder(path) for path in _entries(name)):
            pattern = os.path.join(name, "**", "*.parquet")
            missing += f"; for files in subdirectories, pass a pattern such as {pattern!r}"
    else:
        paths = glob.glob(name, recursive=True)
        missing = f"no file matches {name!r}"
    files = sorted(
        path
        for path in paths
        if os.path.isfile(path) and not _is_result(path) and os.path.realpath(path) not in own
    )
    if not files:
        raise UsageError(missing)
    return files


def _is_result(path: str) -> bool:
    """Whether a file was written by a run: it is a manifest, or there is one next to it."""
    journal = f"{path}.jsonl"  # of a table
    return path.endswith(_MANIFEST) or any(
        os.path.exists(f"{each}{_MANIFEST}") for each in (path, journal)
    )


def _entries(folder: str) -> list[str]:
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as exc:
        raise InputError(f"cannot read {folder}: {error_reason(exc)}") from exc
    return [os.path.join(folder, name) for name in names]


def _suffix(path: str) -> str:
    return without_codec_suffix(Path(path)).suffix.lower()


def _is_folder(name: str) -> bool:
    return "://" not in name and os.path.isdir(name)


def _is_pattern(name: str) -> bool:
    if "://" in name:
        return "*" in name  # a question mark may be part of a URL
    return glob.has_magic(name) and not os.path.exists(name)
