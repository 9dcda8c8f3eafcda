"""The tokenizer and chat template of a model: messages to token ids, token ids to text."""

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
    """Tokenizer and chat template of one model; thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template, special_tokens: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, folder: Path) -> "ChatTokenizer":
        """Load tokenizer.json and the chat template of a model directory.

        The template is read from chat_template.jinja, else from tokenizer_config.json.

        Raises:
            ModelError: a file is missing or invalid.
        """
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises no narrower type
            raise ModelError(f"{path} is not a valid tokenizer: {exc}") from exc
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        special_tokens = {
            name: _token_text(config[name]) for name in SPECIAL_TOKENS if name in config
        }
        return cls(tokenizer, _compile(_template_source(folder, config), folder), special_tokens)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation as a prompt that ends where the assistant's answer begins.

        Raises:
            QueryError: the chat template rejects the messages.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            text = self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, **self._special_tokens
            )
        except TemplateError as exc:
            raise QueryError(
                f"the model's chat template rejects these messages: {exc}", field="messages"
            ) from exc
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenizer_json(self) -> str:
        """The tokenizer in the format of tokenizer.json."""
        return self._tokenizer.to_str()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text, skipping special tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def decoder(self) -> "TextDecoder":
        """A new incremental decoder, for one answer."""
        return TextDecoder(self._tokenizer)


class TextDecoder:
    """Incremental decoder whose concatenated output equals `ChatTokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._num_sent = 0

    def push(self, token_id: int) -> str:
        """Decode one more token; returns "" while a character is incomplete."""
        self._token_ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self._num_sent += len(piece)
        return piece

    def flush(self) -> str:
        """Return the remaining text: U+FFFD for a character that was never completed, else ""."""
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        piece = text[self._num_sent :]
        self._num_sent = len(text)
        return piece


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


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {path}: {exc}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except ValueError as exc:
        raise ModelError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise ModelError(f"{path} does not contain a JSON object")
    return values


def _token_text(token: str | dict[str, Any] | None) -> str:
    """The text of a special token, which older files wrap in {"content": text, ...}."""
    return str(token["content"]) if isinstance(token, dict) else token or ""


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not isinstance(found, str):
        raise ModelError(
            f"{folder} is not a chat model: it has neither chat_template.jinja "
            "nor a chat_template in tokenizer_config.json"
        )
    return found


def _compile(source: str, folder: Path) -> Template:
    """Compile a template in the environment that transformers provides to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as exc:
        raise ModelError(f"the chat template in {folder} is invalid: {exc}") from exc


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: object, indent: int | None = None) -> str:
    """Serialize as JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
