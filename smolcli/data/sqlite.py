"""Rows of an SQLite database, and tables of results in one."""

import math
import sqlite3
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from smolcli.data.rows import Row, row_of_values
from smolcli.errors import (
    InputError,
    QueryError,
    RunError,
    UsageError,
    cannot_read,
    error_reason,
)

SQLITE_MAGIC = b"SQLite format 3\0"
LOCK_TIMEOUT_S = 3.0
_NOT_A_SELECT = "--query must be a SELECT that returns rows"

_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL", bool: "INTEGER"}


def is_database(path: Path) -> bool:
    """Whether a file is an SQLite database."""
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False


def read_sqlite(
    path: Path,
    query: str | None,
    table: str | None,
    choose: Callable[[Sequence[str]], list[str]],
) -> Generator[Row]:
    """Yield the rows of a query or a table, numbered from 1, with their values as JSON values.

    Args:
        path: the database, which is opened read-only.
        query: an SQL query; its order must be the same each time.
        table: name of a table or view to read instead, in the order of its row ids. If neither is
            given, the only table is read.
        choose: selects the columns to read from the names of all of them.

    Raises:
        InputError: the database cannot be read.
        UsageError: the query is invalid, or there is no such table.
    """
    try:
        path.open("rb").close()
    except OSError as exc:
        raise cannot_read(path, exc) from exc
    if not is_database(path):
        raise InputError(f"cannot read {path}: it is not an SQLite database")
    with _connected(path, "ro", InputError, f"cannot read {path}") as database:
        database.set_authorizer(_authorize)
        sql = query if query is not None else _select(database, table)
        try:
            cursor = database.execute(sql)
        except (sqlite3.Error, sqlite3.Warning) as exc:
            if _is_locked(exc):
                raise
            is_denied = getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_AUTH
            raise UsageError(_NOT_A_SELECT if is_denied else f"--query: {exc}") from exc
        if cursor.description is None:
            raise UsageError(_NOT_A_SELECT)
        header = [column[0] for column in cursor.description]
        columns = {name: header.index(name) for name in choose(header)}
        for number, cells in enumerate(cursor, start=1):
            yield row_of_values(number, {name: _value(cells[at]) for name, at in columns.items()})


def reads_table(path: Path, query: str | None, table: str | None, name: str) -> bool:
    """Whether `read_sqlite` would read the table `name`, also through a view.

    False if the rows cannot be read at all.

    Args:
        path: the database.
        query: see `read_sqlite`.
        table: see `read_sqlite`.
        name: name of the table in question.
    """
    found: set[str] = set()

    def note(action: int, read: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ and read is not None:
            found.add(read.casefold())
        return sqlite3.SQLITE_OK

    with (
        suppress(InputError, UsageError, sqlite3.Error, sqlite3.Warning),
        _connected(path, "ro", InputError, f"cannot read {path}") as database,
    ):
        sql = query if query is not None else _select(database, table)
        database.set_authorizer(note)
        database.execute(f"EXPLAIN {sql}").close()
    return name.casefold() in found


def _authorize(action: int, *_: object) -> int:
    """Deny ATTACH, also as a part of VACUUM INTO: it creates files beside a read-only database."""
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK


def _select(database: sqlite3.Connection, table: str | None) -> str:
    """The query that reads a table."""
    kinds = dict(
        database.execute(
            "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') "
            "AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY name"
        )
    )
    names = ", ".join(kinds) or "none"
    if table is None:
        if len(kinds) != 1:
            raise UsageError(f"choose the rows with --table or --query; the tables are: {names}")
        [table] = kinds
    if table not in kinds:
        raise UsageError(f"no table named {table!r}; the tables are: {names}")
    select = f"SELECT * FROM {_quoted(table)}"
    return f"{select} ORDER BY rowid" if _has_rowid(database, table, kinds[table]) else select


def _has_rowid(database: sqlite3.Connection, table: str, kind: str) -> bool:
    try:
        database.execute(f"SELECT rowid FROM {_quoted(table)} LIMIT 0")
    except sqlite3.Error:
        return False  # a table WITHOUT ROWID is read in the order of its key
    return kind == "table"


def _value(cell: object) -> object:
    """A cell as a JSON value; bytes are text if they are UTF-8."""
    if isinstance(cell, bytes):
        return _text(cell)
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell


def _text(data: bytes) -> Any:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return QueryError("the value is not UTF-8 text")


def check_sqlite(path: Path, table: str, may_replace: bool) -> None:
    """Check that a table of results can be written.

    Args:
        path: the database; created if it does not exist.
        table: name of the table.
        may_replace: whether a table of that name may be replaced.

    Raises:
        UsageError: the file is no database, has a table that no run has written, or cannot have a
            table of that name.
    """
    if table.lower().startswith("sqlite_"):
        raise UsageError(f"SQLite reserves the name {table!r}; choose another --output-table")
    if not path.exists() or path.stat().st_size == 0:
        return
    if not is_database(path):
        raise UsageError(f"{path} exists but is not an SQLite database; choose another --output")
    with _connected(path, "ro", RunError, f"cannot read {path}") as database:
        [found] = database.execute(
            "SELECT max(type) FROM sqlite_master WHERE type IN ('table', 'view', 'index') "
            "AND name = ? COLLATE NOCASE",
            (table,),
        ).fetchone()
    if found not in (None, "table"):
        what = "an index" if found == "index" else "a view"
        raise UsageError(f"{path} has {what} named {table!r}; choose another --output-table")
    if found and not may_replace:
        raise UsageError(
            f"{path} already has a table {table!r} that was not written by a run; choose another "
            "--output-table, or replace it with --overwrite"
        )


def write_sqlite(
    path: Path,
    table: str,
    records: Callable[[], Iterable[Mapping[str, Any]]],
    types: Mapping[str, type],
    overwrite: bool = False,
    key: Collection[str] | None = None,
) -> None:
    """Write records as a table, in one transaction; a table that has them already is left alone.

    Args:
        path: the database; created if it does not exist.
        table: name of the table, which is replaced.
        records: returns one mapping from column to value for each row; missing values are NULL.
        types: the type of each column: str, int, float or bool.
        overwrite: whether to replace a table that has them already.
        key: columns by which a table has a record, whatever its other cells; None for all columns.

    Raises:
        RunError: the database cannot be written, or is locked by another program.
    """

    def rows(names: Collection[str]) -> Iterator[tuple[Any, ...]]:
        for record in records():
            yield tuple(_stored(record.get(name)) for name in names)

    names = _distinct(types)
    compared = {n: name for n, name in zip(types, names, strict=True) if key is None or n in key}
    failed = f"cannot write the table {table!r} to {path}"
    with _connected(path, "rwc", RunError, failed) as database:
        if not overwrite and _has_rows(database, table, names, compared.values(), rows(compared)):
            return
        kinds = (_TYPES[kind] for kind in types.values())
        columns = ", ".join(f"{_quoted(n)} {kind}" for n, kind in zip(names, kinds, strict=True))
        places = ", ".join("?" * len(types))
        database.execute("BEGIN IMMEDIATE")
        database.execute(f"DROP TABLE IF EXISTS {_quoted(table)}")
        database.execute(f"CREATE TABLE {_quoted(table)} ({columns})")
        database.executemany(f"INSERT INTO {_quoted(table)} VALUES ({places})", rows(types))
        database.execute("COMMIT")


def _distinct(names: Iterable[str]) -> list[str]:
    """Names of columns, of which SQLite ignores the case, with underscores after repeated ones."""
    distinct: dict[str, str] = {}
    for name in names:
        while name.casefold() in distinct:
            name += "_"
        distinct[name.casefold()] = name
    return list(distinct.values())


def _has_rows(
    database: sqlite3.Connection,
    table: str,
    columns: Iterable[str],
    compared: Iterable[str],
    rows: Iterator[tuple[Any, ...]],
) -> bool:
    """Whether a table has these columns, and exactly these rows in some of them."""
    try:
        found = database.execute(f"SELECT * FROM {_quoted(table)} LIMIT 0").description
        if not {column[0] for column in found}.issuperset(columns):
            return False
        selected = ", ".join(map(_quoted, compared))
        cursor = database.execute(f"SELECT {selected} FROM {_quoted(table)} ORDER BY rowid")
    except sqlite3.OperationalError as exc:
        if _is_locked(exc):
            raise
        return False  # there is no such table
    with closing(cursor):
        return all(next(cursor, None) == row for row in rows) and next(cursor, None) is None


def _stored(value: Any) -> Any:
    """A value as SQLite stores it; lone surrogates are replaced."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return int(value) if isinstance(value, bool) else value


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _is_locked(exc: Exception) -> bool:
    primary_code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    return primary_code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextmanager
def _connected(
    path: Path, mode: str, kind: type[RunError], failed: str
) -> Iterator[sqlite3.Connection]:
    """Open a database without implicit transactions, and translate its errors.

    Args:
        path: the database.
        mode: SQLite's open mode: ro, rw or rwc.
        kind: the error to raise.
        failed: what could not be done, for the message.
    """
    url = f"file:{quote(str(path.absolute()))}?mode={mode}"
    try:
        with closing(
            sqlite3.connect(url, uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        ) as database:
            database.text_factory = _text
            yield database
    except sqlite3.Error as exc:
        if _is_locked(exc):
            reason = "another program has locked the database; close it and run the command again"
        else:
            reason = error_reason(exc)
        raise kind(f"{failed}: {reason}") from exc
