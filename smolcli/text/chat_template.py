"""Chat templates: conversations to the text of a prompt.

Templates are written in Jinja, whose import takes longer than tokenizing a short question. Most
templates only insert the contents of messages between fixed texts. For these, the fixed texts
around the usual conversations, a question with or without a system prompt, are stored as outlines
under SMOL_HOME/tokenizers, and need no Jinja.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smolcli.errors import ModelError, QueryError
from smolcli.settings import smol_home

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Outline = list[str | int]  # fixed texts, and indices of messages whose contents stand there

USUAL = (("user",), ("system", "user"))  # roles of conversations that have outlines
FORMAT = 1  # of the stored outlines
MARK = "\U0010fff0"  # on both sides of the index of a content
NO_TEMPLATE = (
    "the model has no chat template, so that it continues texts but cannot answer messages; "
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
        folder: the model directory, for error messages.
        is_stored: whether outlines are stored, which pays off if starting is otherwise fast.

    Raises:
        ModelError: the template is invalid.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        folder: Path,
        is_stored: bool,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._folder = folder
        self._outlines: dict[str, Outline] = {}
        if is_stored:
            self._outlines = self._stored_outlines()
        else:
            _ = self._template  # raises if it is invalid

    def render(self, turns: Sequence[Mapping[str, Any]], functions: Any = None) -> str:
        """Apply the template.

        Args:
            turns: messages with `role`, `content` and possibly more.
            functions: descriptions of functions, if the template knows tools.

        Raises:
            QueryError: the template rejects the messages.
        """
        if not self.source.strip():
            raise QueryError(NO_TEMPLATE, field="messages")
        outline = self._outlines.get(_key([turn["role"] for turn in turns]))
        if outline is not None and functions is None:
            return "".join(p if isinstance(p, str) else turns[p]["content"] for p in outline)
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=functions, **self._special_tokens
            )
        except TemplateError as exc:
            raise QueryError(
                f"the model's chat template rejects these messages: {exc}", field="messages"
            ) from exc

    @cached_property
    def _template(self) -> "Template":
        from jinja2 import TemplateError

        try:
            return _environment().from_string(self.source)
        except TemplateError as exc:
            raise ModelError(f"the chat template in {self._folder} is invalid: {exc}") from exc

    def _stored_outlines(self) -> dict[str, Outline]:
        """The outlines of an earlier start; else they are made and stored."""
        identity = json.dumps([FORMAT, self.source, self._special_tokens])
        digest = hashlib.sha256(identity.encode()).hexdigest()
        path = smol_home() / "tokenizers" / f"{digest[:32]}.outlines.json"
        with suppress(OSError, ValueError):
            return dict(json.loads(path.read_bytes()))
        outlines = self._made_outlines()
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(outlines), "utf-8")
            partial.replace(path)
        return outlines

    def _made_outlines(self) -> dict[str, Outline]:
        made: dict[str, Outline] = {}
        _ = self._template  # raises if it is invalid
        if only_inserts_contents(self.source):
            for roles in USUAL:
                marks = [f"{MARK}{i}{MARK}" for i in range(len(roles))]
                turns = [
                    {"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)
                ]
                with suppress(Exception):  # templates may fail in many ways
                    made[_key(roles)] = _split(self.render(turns), marks)
        return made


def only_inserts_contents(source: str) -> bool:
    """Whether a valid template does nothing with contents but to insert them as they are.

    Templates that use anything but conditions, loops over all messages and sums of texts count as
    doing more.
    """
    return _Inspection().accepts(_environment().parse(source), is_inserted=False)


class _Inspection:
    """Walks through the syntax tree of a template."""

    def __init__(self) -> None:
        self._messages = {"messages"}  # names of messages and lists of them

    def accepts(self, node: Any, is_inserted: bool) -> bool:
        """Whether a node is simple.

        Args:
            node: of Jinja's syntax tree.
            is_inserted: whether its value is only inserted into the text.
        """
        from jinja2 import nodes

        match node:
            case nodes.Getattr() | nodes.Getitem():
                return self._accepts_access(node, is_inserted)
            case nodes.Name():
                return node.name not in self._messages
            case nodes.For():
                is_plain = isinstance(node.iter, nodes.Name) and node.iter.name == "messages"
                if not (is_plain and isinstance(node.target, nodes.Name)) or node.test:
                    return False
                self._messages.add(node.target.name)
                return all(self.accepts(each, False) for each in [*node.body, *node.else_])
            case nodes.Output() | nodes.Add() | nodes.Concat():
                is_inserted = is_inserted or isinstance(node, nodes.Output)
            case nodes.CondExpr():
                branches = [each for each in (node.expr1, node.expr2) if each is not None]
                return self.accepts(node.test, False) and all(
                    self.accepts(each, is_inserted) for each in branches
                )
            case nodes.Template() | nodes.If() | nodes.Compare() | nodes.Operand():
                is_inserted = False
            case nodes.And() | nodes.Or() | nodes.Not():
                is_inserted = False
            case nodes.TemplateData() | nodes.Const():
                return True
            case _:
                return False
        return all(self.accepts(each, is_inserted) for each in node.iter_child_nodes())

    def _accepts_access(self, node: Any, is_inserted: bool) -> bool:
        """Whether a member is of `loop`, or the role or an inserted content of a message."""
        from jinja2 import nodes

        is_attribute = isinstance(node, nodes.Getattr)
        if not is_attribute and not isinstance(node.arg, nodes.Const):
            return False
        member = node.attr if is_attribute else node.arg.value
        base = node.node
        if isinstance(base, nodes.Name) and base.name == "loop":
            return member in ("first", "last", "index", "index0")
        if member != "role" and not (member == "content" and is_inserted):
            return False
        if isinstance(base, nodes.Getitem):  # messages[0]
            is_index = isinstance(base.arg, nodes.Const) and isinstance(base.arg.value, int)
            base = base.node
            return is_index and isinstance(base, nodes.Name) and base.name == "messages"
        return isinstance(base, nodes.Name) and base.name in self._messages - {"messages"}


def _key(roles: Sequence[str]) -> str:
    return ",".join(roles)


def _split(text: str, marks: Sequence[str]) -> Outline:
    """Cut a text at the marks, which become their indices."""
    parts: Outline = [text]
    for index, mark in enumerate(marks):
        cut: Outline = []
        for part in parts:
            pieces: Sequence[str | int] = part.split(mark) if isinstance(part, str) else [part]
            for place, piece in enumerate(pieces):
                cut += [index, piece] if place else [piece]
        parts = cut
    return parts


def _environment() -> "ImmutableSandboxedEnvironment":
    """The environment that transformers provides to templates."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: object, indent: int | None = None) -> str:
    """Serialize as JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
