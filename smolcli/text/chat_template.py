"""Chat templates: conversations to the text of a prompt."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smolcli.errors import ModelError, QueryError, UsageError

NO_TEMPLATE = (
    "the model has no chat template, so it can continue text but not answer messages; "
    "send a raw_prompt (/v1/completions over HTTP), or choose a template with --chat-template"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED_TEMPLATES = {"chatml": CHATML}


class ChatTemplate:
    """The chat template of one model; thread-safe.

    Args:
        source: its text; "" if the model has none.
        special_tokens: texts that it may refer to, by name (`bos_token`, ...).
        folder: the model directory that it comes from; None if the user chose it.

    Raises:
        ModelError: the model's template is invalid.
        UsageError: the user's template is invalid.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], folder: Path | None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _compile(source)
        except TemplateError as exc:
            if folder is None:
                raise UsageError(f"the given chat template is invalid: {exc}") from exc
            raise ModelError(f"the chat template in {folder} is invalid: {exc}") from exc

    def render(self, turns: Sequence[Mapping[str, Any]], functions: Any = None) -> str:
        """Apply the template.

        Args:
            turns: messages with `role`, `content` and possibly more.
            functions: descriptions of functions, if the template knows tools.

        Raises:
            QueryError: the template rejects the messages, or fails on them.
        """
        if not self.source.strip():
            raise QueryError(NO_TEMPLATE, field="messages")
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=functions, **self._special_tokens
            )
        except Exception as exc:  # a template is third-party code and may raise anything
            raise QueryError(
                f"the model's chat template rejects these messages: {exc}", field="messages"
            ) from exc


def _compile(source: str) -> Template:
    """Compile a template in the environment that transformers provides to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: object, indent: int | None = None) -> str:
    """Serialize as JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
