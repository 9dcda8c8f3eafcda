"""The tokenizer and chat template of a model: messages to the token ids of a prompt."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from smolcli.errors import ModelError, QueryError, error_reason
from smolcli.protocol.json_text import parse_object
from smolcli.protocol.tools import function_record
from smolcli.text.chat_template import ChatTemplate
from smolcli.text.detokenizer import TextDecoder
from smolcli.text.prompt_encoder import PromptEncoder
from smolcli.text.tool_calls import (
    LIST,
    MARKER,
    CallSyntax,
    plain_messages,
    template_message,
    template_syntax,
)
from smolcli.text.vocabulary_index import IndexedTokenizer, open_indexed, write_index
from smolcli.types import Message, PromptLimit, Query, ToolMode, Tools

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")


class ChatTokenizer:
    """Tokenizer and chat template of one model; thread-safe.

    Args:
        tokenizer: the model's tokenizer.
        tokenizer_json: returns the same in the format of tokenizer.json.
        template: renders messages to a prompt.
        special_tokens: texts that the template may refer to, by name (`bos_token`, ...).
        vocab_size: rows of the model's embedding; None if unknown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | IndexedTokenizer,
        tokenizer_json: Callable[[], str],
        template: ChatTemplate,
        special_tokens: Mapping[str, str],
        vocab_size: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._json = tokenizer_json
        self._template = template
        is_special = any(
            token.special and token.content == MARKER
            for token in tokenizer.get_added_tokens_decoder().values()
        )
        self._template_syntax = None if is_special else template_syntax(template.source)
        self._encoder = PromptEncoder(tokenizer, template.source, special_tokens, tokenizer_json)

    @classmethod
    def load(
        cls, folder: Path, template_source: str = "", *, starts_fast: bool = False
    ) -> "ChatTokenizer":
        """Load tokenizer.json and the chat template of a model directory.

        The template is read from chat_template.jinja, else from tokenizer_config.json.

        Args:
            folder: the model directory.
            template_source: chat template to use instead of the model's own; "" for none.
            starts_fast: whether to load only the tokens that the first texts need. The index for
                this is written at the first start.

        Raises:
            ModelError: a file is missing or invalid, or the tokenizer has more tokens than the
                model that config.json describes.
            UsageError: `template_source` is invalid.
        """
        tokenizer, tokenizer_json = _load_tokenizer(folder / "tokenizer.json", starts_fast)
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        special_tokens = {
            name: _token_text(config[name]) for name in SPECIAL_TOKENS if name in config
        }
        vocab_size = _vocab_size(folder)
        if vocab_size is not None:
            _check_ids(tokenizer, vocab_size, special_tokens.get("pad_token"), folder)
        if template_source:
            template = ChatTemplate(template_source, special_tokens, None)
        else:
            template = ChatTemplate(_template_source(folder, config), special_tokens, folder)
        return cls(tokenizer, tokenizer_json, template, special_tokens, vocab_size)

    @property
    def call_syntax(self) -> CallSyntax:
        """How prompts ask the model to write calls."""
        return self._template_syntax or LIST

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        continues: bool = False,
        limit: PromptLimit | None = None,
    ) -> list[int]:
        """Encode a conversation as a prompt that ends where the assistant's answer begins.

        The text of a message or a tool never becomes a control token.

        Args:
            messages: the conversation.
            tools: functions that the prompt describes to the model.
            continues: whether the prompt ends with the text of the last message, for the model to
                continue, instead of the beginning of an answer to it.
            limit: the longest prompt that the model can use.

        Raises:
            PromptTooLong: the prompt exceeds `limit`, whatever its tokens are.
            QueryError: the chat template rejects the messages, or the model has no embedding for
                one of their tokens.
        """
        if tools is not None and tools.mode is ToolMode.NONE:
            tools = None
        if self._template_syntax is None:
            messages, tools = plain_messages(messages, tools), None
        render = self._render_open if continues else self.render
        ids = self._encoder.encode(messages, tools, render, limit)
        if self._vocab_size is not None and max(ids, default=0) >= self._vocab_size:
            raise QueryError(
                f"the model has no embedding for the token {max(ids)} of this prompt",
                field="messages",
            )
        return ids

    def shared_prefix(self) -> list[int]:
        """The tokens that all prompts of a single user message begin with."""
        prompts = [self.encode([Message("user", text)]) for text in ("a", "1")]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))
        return [token_id for token_id, _ in same]

    def encode_query(self, query: Query, limit: PromptLimit | None = None) -> list[int]:
        """Encode the conversation of a query and its tools, or its raw prompt.

        Control tokens that are written out in a raw prompt are control tokens.

        Args:
            query: the query.
            limit: see `encode`.

        Raises:
            PromptTooLong: see `encode`.
            QueryError: see `encode`; or the raw prompt is empty, or has a token id that the model
                does not have.
        """
        raw = query.raw_prompt
        if raw is None:
            return self.encode(query.messages, query.tools, query.continues, limit)
        ids = self._encoder.encode_raw(raw, limit) if isinstance(raw, str) else list(raw)
        if not ids:
            raise QueryError("raw_prompt contains no token", field="raw_prompt")
        if self._vocab_size is not None and max(ids) >= self._vocab_size:
            raise QueryError(
                f"raw_prompt contains token id {max(ids)}, but the model's vocabulary has "
                f"{self._vocab_size} tokens",
                field="raw_prompt",
            )
        return ids

    def raw_text(self, raw_prompt: str | Sequence[int]) -> str:
        """The text of a raw prompt, with its control tokens written out."""
        if isinstance(raw_prompt, str):
            return raw_prompt
        return self._tokenizer.decode(raw_prompt, skip_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text without the chat template; control tokens in it are ordinary text."""
        return self._encoder.encode_text(text)

    def word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word at the beginning of a text and, if they differ, after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word.lstrip(), f" {word.lstrip()}"):
                found[tuple(self.encode_text(text))] = None
        return tuple(ids for ids in found if ids)

    def render(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """Apply the chat template.

        Args:
            messages: the conversation.
            tools: functions to describe, if the template knows tools.

        Raises:
            QueryError: the chat template rejects the messages.
        """
        names = {call.id: call.name for turn in messages for call in turn.tool_calls}
        turns = [template_message(turn, names) for turn in messages]
        functions = [function_record(function) for function in tools.functions] if tools else None
        return self._template.render(turns, functions)

    def _render_open(self, messages: Sequence[Message], tools: Tools | None) -> str:
        return self.render(messages[:-1], tools) + messages[-1].content

    def tokenizer_json(self) -> str:
        """The tokenizer in the format of tokenizer.json."""
        return self._json()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text, skipping special tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def decoder(self) -> TextDecoder:
        """A new incremental decoder, for one answer."""
        return TextDecoder(self._tokenizer)


def _load_tokenizer(
    path: Path, starts_fast: bool
) -> tuple[Tokenizer | IndexedTokenizer, Callable[[], str]]:
    """The tokenizer, and what returns its JSON without truncation and padding."""
    try:
        source = path.read_bytes()
        if starts_fast and (indexed := open_indexed(source)):
            return indexed, source.decode
        tokenizer = Tokenizer.from_str(source.decode())
        if starts_fast:
            write_index(source)
    except Exception as exc:  # the library raises no narrower type
        raise ModelError(f"{path} is not a valid tokenizer: {exc}") from exc
    if not (tokenizer.truncation or tokenizer.padding):
        return tokenizer, source.decode
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = tokenizer.to_str()
    return tokenizer, lambda: text


def context_length(folder: Path) -> int:
    """The context length of the model in `folder`, in tokens, prompt and answer together.

    Raises:
        ModelError: config.json does not define it.
    """
    path = folder / "config.json"
    length = _read_json(path).get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        raise ModelError(f"{path} has no valid max_position_embeddings")
    return length


def _vocab_size(folder: Path) -> int | None:
    """The number of rows of the model's embedding; None without a config.json."""
    path = folder / "config.json"
    size = _read_json(path).get("vocab_size") if path.is_file() else None
    return size if type(size) is int else None  # the loader rejects anything else


def _check_ids(
    tokenizer: Tokenizer | IndexedTokenizer, vocab_size: int, padding: str | None, folder: Path
) -> None:
    """Check that all tokens have a row in the embedding.

    Padding may lie beyond it: fine-tuned models add such a token, and no prompt contains it.
    """
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    beyond = [i for i, text in added.items() if i >= vocab_size and text != padding]
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
    if num_tokens > vocab_size or beyond:
        raise ModelError(
            f"{folder / 'tokenizer.json'} has token ids up to "
            f"{max([num_tokens - 1, *beyond])}, but config.json has vocab_size {vocab_size}"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {path}: {error_reason(exc)}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(_read_text(path))
    except ValueError as exc:
        raise ModelError(f"cannot read {path}: {exc}") from exc


def _token_text(token: object) -> str:
    """The text of a special token, which older files wrap in {"content": text, ...}; "" if none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    """The model's own template; "" if it has none, like base models."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        named = (entry for entry in found if isinstance(entry, dict))
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return found if isinstance(found, str) else ""
