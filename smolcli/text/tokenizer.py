"""Conversations to token ids and token ids to text, by a model's own template and tokenizer."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from smolcli.errors import ModelError, QueryError
from smolcli.types import Message

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")


class ChatTokenizer:
    """The words of one model; safe to use from any thread."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template, special_tokens: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, folder: Path) -> "ChatTokenizer":
        """Read tokenizer.json, and the template in chat_template.jinja or tokenizer_config.json.

        Raises:
            ModelError: if one of them is missing or unreadable.
        """
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises nothing more precise
            raise ModelError(f"{path} is no tokenizer: {exc}") from exc
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        special_tokens = {name: _content(config[name]) for name in SPECIAL_TOKENS if name in config}
        return cls(tokenizer, _compile(_template_source(folder, config), folder), special_tokens)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids, up to where the assistant's answer begins.

        Raises:
            QueryError: if the template refuses these messages.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            text = self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, **self._special_tokens
            )
        except TemplateError as exc:
            raise QueryError(
                f"the model's chat template refuses these messages: {exc}", field="messages"
            ) from exc
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenizer_json(self) -> str:
        """The tokenizer as tokenizer.json has it."""
        return self._tokenizer.to_str()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def decoder(self) -> "TextDecoder":
        """A decoder for one answer whose tokens come one at a time."""
        return TextDecoder(self._tokenizer)


class TextDecoder:
    """Decodes one answer incrementally; the pieces concatenated equal `ChatTokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._num_sent = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, "" while a character is not whole."""
        self._token_ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self._num_sent += len(piece)
        return piece

    def flush(self) -> str:
        """What is left when no token follows: the replacement of a character never completed."""
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        piece = text[self._num_sent :]
        self._num_sent = len(text)
        return piece


def context_length(folder: Path) -> int:
    """How many tokens, prompt and answer together, the model in `folder` can attend to.

    Raises:
        ModelError: if its config.json does not say.
    """
    path = folder / "config.json"
    length = _read_json(path).get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        raise ModelError(f"{path} has no usable max_position_embeddings")
    return length


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} cannot be read: {exc}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except ValueError as exc:
        raise ModelError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return values


def _content(token: str | dict[str, Any] | None) -> str:
    """A special token's text; older files write {"content": text, ...}."""
    return str(token["content"]) if isinstance(token, dict) else token or ""


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    found = config.get("chat_template")
    if isinstance(found, list):  # several templates with names
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not isinstance(found, str):
        raise ModelError(
            f"{folder} has no chat template, so this is no chat model: it needs a "
            "chat_template.jinja, or chat_template in tokenizer_config.json"
        )
    return found


def _compile(source: str, folder: Path) -> Template:
    """Compile a template with what transformers lets templates use."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as exc:
        raise ModelError(f"the chat template in {folder} is not valid: {exc}") from exc


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: object, indent: int | None = None) -> str:
    """As JSON, unlike Jinja's own filter without HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
