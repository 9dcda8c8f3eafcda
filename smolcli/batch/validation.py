"""`smol run --check`: every fault of an input that can be known without a model."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from smolcli.batch.queries import ChatIds, QueryReader
from smolcli.data.reader import read_rows
from smolcli.errors import PromptTooLong, QueryError
from smolcli.settings import RunSettings
from smolcli.text.grammar import check_format
from smolcli.text.tokenizer import ChatTokenizer, context_length
from smolcli.types import Query, Result, failure
from smolcli.weights import hub
from smolcli.weights.resolve import local
from smolcli.weights.store import stored

logger = logging.getLogger(__name__)

Examine = Callable[[Query], None]


def check_input(settings: RunSettings, examine: Examine | None) -> Iterator[Query | Result]:
    """Yield each line's query, or the error result it would get.

    Args:
        settings: which input, and what its queries are completed with.
        examine: raises QueryError for a well-formed query that cannot be answered; None where
            nobody can tell.

    Raises:
        UsageError: where the input has not the columns that are asked for.
        InputError: where the input cannot be read.
    """
    rows = islice(read_rows(settings.input, settings.rows), settings.limit)
    for item in QueryReader(rows, settings.defaults, ChatIds()):
        yield item if isinstance(item, Result) else _examined(item, examine)


def _examined(query: Query, examine: Examine | None) -> Query | Result:
    try:
        if query.format is not None:
            check_format(query.format)
        if examine is not None:
            examine(query)
    except QueryError as exc:
        return failure(query, str(exc), exc.code, exc.field)
    return query


def prompt_fits(folder: Path) -> Examine:
    """Examines whether prompts leave the model in `folder` room for an answer."""
    chat, limit = ChatTokenizer.load(folder), context_length(folder) - 1

    def examine(query: Query) -> None:
        if (num_tokens := len(chat.encode(query.messages))) > limit:
            raise PromptTooLong(num_tokens, limit)

    return examine


def folder_on_disk(model: str) -> Path | None:
    """Where a model lies; None if it would have to be downloaded or converted first.

    Raises:
        ModelNotFound: where the name can mean none.
    """
    if Path(model).suffix.lower() == ".gguf":
        return None
    files = local(model, logger.info) or hub.cached(model) or stored(model)
    return files.folder if files else None
