"""`--truncate-prompt`: cuts the middle of prompts that leave no room for their answer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from smolcli.batch.statistics import CUT_KEY
from smolcli.data.rows import Row
from smolcli.errors import UsageError
from smolcli.settings import EngineSettings
from smolcli.text.tokenizer import ChatTokenizer, context_length
from smolcli.types import Message, Query
from smolcli.weights.resolve import on_disk

MARK = " [...] "  # in place of what was cut

_LONGEST_TOKEN = 32  # characters; almost all tokens are shorter
_MESSAGE_TOKENS = 64  # upper bound on what a chat template adds to each further message


@dataclass(frozen=True, slots=True)
class Cuttable:
    """The text of a query to cut.

    Args:
        text: the whole text.
        put: returns the query with another text in its place.
    """

    text: str
    put: Callable[[str], Query]


class PromptTruncation:
    """Makes prompts fit into the context window of a model, together with their answers.

    Args:
        engine: the model, whose tokenizer counts, and its chat template. They are loaded when the
            first long prompt is seen.
    """

    def __init__(self, engine: EngineSettings) -> None:
        self._model = engine.model
        self._chat_template = engine.chat_template

    def fit(self, query: Query, row: Row) -> Query:
        """Cut the middle of the longest field or message as far as necessary.

        The prompt leaves room for `max_new_tokens`, but is not cut below half of the context
        window. If the rest is too long even without that text, the query stays as it is.

        Args:
            query: the row's query.
            row: knows the fields of a prompt that was rendered from a template.

        Returns:
            The query; one that was cut says in its metadata by how many characters.

        Raises:
            QueryError: the messages cannot be encoded.
            UsageError: the tokenizer is not on this machine.
        """
        if isinstance(query.raw_prompt, tuple):
            return query
        limit = self._limit(query)
        if (_is_plain(query) and self._most_tokens(query) <= limit) or self._fits(query, limit):
            return query
        cuttable = _cuttable(query, row)
        kept = self._most_that_fits(cuttable, limit)
        if kept is None:
            return query
        num_cut = len(cuttable.text) - kept
        metadata = {**(query.metadata or {}), CUT_KEY: num_cut}
        return replace(cuttable.put(_cut(cuttable.text, kept)), metadata=metadata)

    def _most_tokens(self, query: Query) -> int:
        """A cheap upper bound for a plain query: no token is shorter than a byte."""
        num_bytes = sum(len(text.encode()) for text in _texts(query))
        if query.raw_prompt is not None:
            return num_bytes
        return num_bytes + self._template_tokens + _MESSAGE_TOKENS * len(query.messages)

    @cached_property
    def _template_tokens(self) -> int:
        """Tokens of the chat template around a single message, a default system prompt included."""
        return len(self._tokenizer.encode([Message("user", "Hi")]))

    def _limit(self, query: Query) -> int:
        longest = self._context_length
        return max(longest - query.sampling.max_new_tokens, longest // 2)

    def _fits(self, query: Query, limit: int) -> bool:
        return len(self._tokenizer.encode_query(query)) <= limit

    def _most_that_fits(self, cuttable: Cuttable, limit: int) -> int | None:
        """How many characters can be kept; None if the prompt is too long without any."""
        best, low = None, 0
        high = min(len(cuttable.text) - 1, limit * _LONGEST_TOKEN)
        while low <= high:
            middle = (low + high) // 2
            if self._fits(cuttable.put(_cut(cuttable.text, middle)), limit):
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    @cached_property
    def _folder(self) -> Path:
        """The model's folder."""
        files = on_disk(self._model)
        if files is None:
            raise UsageError(
                f"--truncate-prompt needs the tokenizer of {self._model}, which is not on this "
                f"machine; run smol pull {self._model} first"
            )
        return files.folder

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.load(self._folder, self._chat_template)

    @cached_property
    def _context_length(self) -> int:
        return context_length(self._folder)


def _is_plain(query: Query) -> bool:
    """Whether the prompt has no text besides the messages and the chat template."""
    return query.tools is None and not any(turn.tool_calls for turn in query.messages)


def _texts(query: Query) -> list[str]:
    if isinstance(query.raw_prompt, str):
        return [query.raw_prompt]
    return [message.content for message in query.messages]


def _cuttable(query: Query, row: Row) -> Cuttable:
    """The longest field of a template, or else the longest message."""
    if isinstance(query.raw_prompt, str):
        return Cuttable(query.raw_prompt, lambda text: replace(query, raw_prompt=text))
    messages = query.messages

    def with_content(index: int, text: str) -> Query:
        changed = replace(messages[index], content=text)
        return replace(query, messages=(*messages[:index], changed, *messages[index + 1 :]))

    last = len(messages) - 1
    if (longest := row.longest) is not None:
        return Cuttable(longest.text, lambda text: with_content(last, longest.render(text)))
    index = max(range(len(messages)), key=lambda at: len(messages[at].content))
    return Cuttable(messages[index].content, lambda text: with_content(index, text))


def _cut(text: str, kept: int) -> str:
    """A text with only `kept` characters, from both ends, around a mark."""
    head, tail = (kept + 1) // 2, kept // 2
    return f"{text[:head]}{MARK}{text[len(text) - tail :]}"
