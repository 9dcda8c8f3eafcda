"""`smol run --check`: finds every invalid line without loading the model's weights."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from smolcli.batch.chat_ids import ChatIds
from smolcli.batch.input_scan import input_format
from smolcli.batch.queries import QueryReader
from smolcli.batch.truncation import PromptTruncation
from smolcli.data.inputs import Inputs
from smolcli.errors import PromptTooLong, QueryError
from smolcli.protocol.line_formats import stated_format
from smolcli.settings import RunSettings
from smolcli.text.grammar import GrammarSpec, check_grammar
from smolcli.text.tokenizer import ChatTokenizer, context_length
from smolcli.types import PromptLimit, Query, Result, failure
from smolcli.weights.resolve import on_disk

CheckQuery = Callable[[Query], None]


def check_input(settings: RunSettings, check_query: CheckQuery | None) -> Iterator[Query | Result]:
    """Yield each line's query, or the error result that a run would write for it.

    Args:
        settings: the input and the defaults for its queries.
        check_query: raises QueryError for a valid query that the model cannot answer; None skips
            this check, and truncation.

    Raises:
        UsageError: the input lacks a column that the settings name.
        InputError: the input cannot be read.
    """
    inputs = Inputs.of(settings)
    rows = islice(inputs.read(), settings.limit)
    format = input_format(inputs, settings) if inputs.is_several else stated_format(settings.rows)
    fit = None
    if settings.rows.truncate_prompt and check_query is not None:
        fit = PromptTruncation(settings.engine).fit
    for item in QueryReader(rows, settings.defaults, ChatIds(), format, fit):
        yield item if isinstance(item, Result) else _checked(item, check_query)


def _checked(query: Query, check_query: CheckQuery | None) -> Query | Result:
    try:
        if not (spec := GrammarSpec(query.format, query.tools)).is_free:
            check_grammar(spec)
        if check_query is not None:
            check_query(query)
    except QueryError as exc:
        return failure(query, str(exc), exc.code, exc.field)
    return query


def prompt_fits(folder: Path, chat_template: str = "") -> CheckQuery:
    """A check that prompts leave the model room for a new token, if they want one.

    Args:
        folder: the model directory.
        chat_template: see `EngineSettings`.
    """
    chat, longest = ChatTokenizer.load(folder, chat_template), context_length(folder)

    def check(query: Query) -> None:
        limit = PromptLimit.of(longest, query.sampling)
        if (num_tokens := len(chat.encode_query(query, limit))) > limit.num_tokens:
            raise PromptTooLong(num_tokens, limit)

    return check


def folder_on_disk(model: str) -> Path | None:
    """The model's folder, or None if it would have to be downloaded or converted first.

    Raises:
        ModelNotFound: `model` is neither a usable path nor a valid name.
    """
    if Path(model).suffix.lower() == ".gguf":
        return None
    files = on_disk(model)
    return files.folder if files else None
