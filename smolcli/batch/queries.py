"""From the rows of a file to queries, with each bad row's error result in its place."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain

from smolcli.data.rows import Row
from smolcli.errors import QueryError
from smolcli.protocol.line_formats import LineFormat, detect_format
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query, Result, failure


class ChatIds:
    """The ids that a file has used so far: 16 bytes for each, however long it is."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def claim(self, chat_id: str) -> bool:
        """Take an id; False where it was taken before."""
        num_before = len(self._digests)
        self._digests.add(blake2b(chat_id.encode(), digest_size=16).digest())
        return len(self._digests) > num_before


class QueryReader:
    """One item for each row, in order; the first row with an id owns it, valid or not.

    Args:
        rows: to go through, once.
        defaults: values for the fields that a row leaves out.
        ids: those that earlier rows have taken.
        format: the format of the rows; detected from the first rows if None.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        defaults: QueryDefaults,
        ids: ChatIds,
        format: LineFormat | None = None,
    ) -> None:
        self._rows = rows
        self._defaults = defaults
        self._ids = ids
        self._format = format

    @property
    def format(self) -> LineFormat:
        """The format of the rows; known once the first item has been yielded."""
        assert self._format is not None
        return self._format

    def __iter__(self) -> Iterator[Query | Result]:
        rows = iter(self._rows)
        sample: list[Row] = []
        if self._format is None:
            self._format = detect_format(_values(rows, sample), self._defaults)
        for row in chain(sample, rows):
            item = _parse(row, self._format, self._defaults)
            if item.chat_id and not self._ids.claim(item.chat_id) and isinstance(item, Query):
                item = _duplicate(item, self._format.id_field)
            yield item


def _values(rows: Iterator[Row], sample: list[Row]) -> Iterator[object]:
    """The value of each row; the rows that were consumed are kept in `sample`."""
    for row in rows:
        sample.append(row)
        yield row.value


def _parse(row: Row, format: LineFormat, defaults: QueryDefaults) -> Query | Result:
    """The query that a row holds, or the error result that takes its place."""
    try:
        if row.fault is not None:
            raise row.fault
        return format.parse(row.value, defaults, row.number)
    except QueryError as exc:
        return Result(
            chat_id=format.id_of(row.value),
            error=str(exc),
            error_code=exc.code,
            field=exc.field,
            metadata=row.carried,
            line=row.number,
        )


def _duplicate(query: Query, id_field: str) -> Result:
    chat_id = query.chat_id if len(query.chat_id) <= 100 else f"{query.chat_id[:100]}..."
    message = f"{id_field} {chat_id!r} was already used on an earlier line"
    return failure(query, message, ErrorCode.DUPLICATE_CHAT_ID, id_field)
