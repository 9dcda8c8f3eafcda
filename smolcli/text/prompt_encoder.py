"""Encodes prompts so that the text of a message never becomes a control token."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property

from tokenizers import AddedToken, Tokenizer

from smolcli.errors import PromptTooLong, QueryError
from smolcli.protocol.json_text import parse_json
from smolcli.text.vocabulary_index import IndexedTokenizer, longest_token
from smolcli.types import Function, Message, PromptLimit, ToolCall, Tools

# Unicode's supplementary private use areas: A for hidden letters, B for the aliases' secret.
PRIVATE_USE_A, PRIVATE_USE_B = range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)
IS_PRIVATE_USE_A = re.compile("[\U000f0000-\U000ffffd]")
LONG_TEXT = 4096  # characters; shorter texts are encoded in about a millisecond
HUGE_TEXT = 1 << 16  # characters; encoding shorter texts needs little memory

Render = Callable[[Sequence[Message], Tools | None], str]  # applies a chat template


class PromptEncoder:
    """Encodes rendered prompts without letting the text of a message become a control token.

    `tokenizers` recognizes a control token by its text, no matter who wrote it. The encoder
    therefore gives every control token an alias, a token with the same properties and a secret
    text, and makes the library treat the original text as ordinary text. To find out which
    control tokens the template itself wrote, it renders the messages a second time with the
    characters of their contents replaced by private ones, which no control token contains. Only
    control tokens found in that rendering are replaced by their aliases. The prompt is then
    encoded in one piece, so ordinary text gets exactly the tokens that it always gets.

    A control token is an added token that is marked as special or that the template mentions.

    Args:
        tokenizer: the model's tokenizer; aliases are added to it, which never occur in output.
        template_source: the chat template.
        special_tokens: texts that the template may refer to, by name.
        tokenizer_json: returns the tokenizer in the format of tokenizer.json.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | IndexedTokenizer,
        template_source: str,
        special_tokens: Mapping[str, str],
        tokenizer_json: Callable[[], str],
    ) -> None:
        self._json = tokenizer_json
        added = tokenizer.get_added_tokens_decoder()
        mentioned = template_source + "\n".join(special_tokens.values())
        control = {
            token_id: token
            for token_id, token in added.items()
            if token.special or (token.content.strip() and token.content in mentioned)
        }
        if not all(token.special for token in control.values()):
            assert isinstance(tokenizer, Tokenizer)  # indexed ones have only special tokens
            tokenizer = Tokenizer.from_str(tokenizer.to_str())  # decoding needs the flags unchanged
            tokenizer.add_special_tokens([_copied(t, t.content, True) for t in control.values()])
        tokenizer.encode_special_tokens = True  # as ordinary text
        secret = _secret()
        aliases = {token_id: f"{secret}{token_id}{secret}" for token_id in control}
        tokenizer.add_tokens([_copied(t, aliases[i], False) for i, t in control.items()])
        self._tokenizer = tokenizer
        self._aliases = {token.content: aliases[token_id] for token_id, token in control.items()}
        self._ids = {tokenizer.token_to_id(alias): i for i, alias in aliases.items()}
        self._never = frozenset(control) - _harmless_unknown(tokenizer, mentioned)
        self._patterns = [
            _any_of([token for token in added.values() if token.normalized == is_normalized])
            for is_normalized in (False, True)
        ]
        self._letters = _letters(token.content for token in control.values())

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        render: Render,
        limit: PromptLimit | None = None,
    ) -> list[int]:
        """Render and encode messages.

        Args:
            messages: the conversation.
            tools: functions to describe.
            render: the chat template; returns the prompt's text.
            limit: the longest prompt that the model can use.

        Raises:
            PromptTooLong: the prompt exceeds `limit`, whatever its tokens are.
            QueryError: from `render`, or if the vocabulary itself turns text into a control token.
        """
        text = self._with_aliases(messages, tools, render, limit)
        encoded = self._encoded(text, add_special_tokens=False)
        if not self._never.isdisjoint(encoded):
            raise QueryError(
                "the model's tokenizer cannot represent this text without a control token",
                field="messages",
            )
        return [self._ids.get(token_id, token_id) for token_id in encoded]

    def encode_raw(self, text: str, limit: PromptLimit | None = None) -> list[int]:
        """Encode text whose control tokens count, and add those that start every text, if any.

        Args:
            text: the prompt.
            limit: see `encode`.

        Raises:
            PromptTooLong: see `encode`.
        """
        self._check_length(text, limit)
        encoded = self._encoded(self._aliased(text)[0], add_special_tokens=True)
        return [self._ids.get(token_id, token_id) for token_id in encoded]

    def encode_text(self, text: str) -> list[int]:
        """Encode text in which no control token is recognized."""
        return self._encoded(text, add_special_tokens=False)

    def _encoded(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text.

        `Tokenizer.encode` stops all other threads of Python until it returns; the methods for
        several texts do not.
        """
        tokenizer = self._tokenizer
        if isinstance(tokenizer, IndexedTokenizer) or len(text) <= LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        (encoded,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoded.ids

    def _check_length(self, text: str, limit: PromptLimit | None) -> None:
        """Reject a text that exceeds `limit`, whatever its tokens are.

        Encoding takes hundreds of bytes of memory per token.
        """
        if limit is None or len(text) <= HUGE_TEXT or self._longest_token is None:
            return
        min_tokens = -(-len(text.encode()) // self._longest_token)
        if min_tokens > limit.num_tokens:
            raise PromptTooLong(min_tokens, limit, is_exact=False)

    @cached_property
    def _longest_token(self) -> int | None:
        return longest_token(parse_json(self._json()))

    def _with_aliases(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        render: Render,
        limit: PromptLimit | None,
    ) -> str:
        """The prompt's text, with aliases for the control tokens that the template wrote."""
        text = render(messages, tools)
        self._check_length(text, limit)
        hide = self._private_letters(text)
        substitution = Substitution({ord(letter): private for letter, private in hide.items()})
        turns = [substitution.message(turn) for turn in messages]
        safe, control = self._aliased(render(turns, substitution.tools(tools)))
        plain, plain_control = self._aliased(text)
        # A template that looks at contents, for example to cut off a part, may render the hidden
        # ones differently. The plain rendering counts unless contents added control tokens to it.
        contents = _contents(messages, tools)
        if plain_control == control and not self._occur_in(contents):
            return plain
        return safe.translate({ord(private): letter for letter, private in hide.items()})

    def _aliased(self, text: str) -> tuple[str, list[str]]:
        """Replace control tokens by their aliases; also returns the control tokens, in order."""
        found: list[str] = []

        def alias(match: re.Match[str]) -> str:
            if match[0] not in self._aliases:
                return match[0]
            found.append(match[0])
            return self._aliases[match[0]]

        for pattern in self._patterns:
            text = pattern.sub(alias, text)
        return text, found

    def _occur_in(self, contents: Sequence[str]) -> bool:
        return any(token in text for token in self._aliases for text in contents)

    def _private_letters(self, text: str) -> dict[str, str]:
        """A private-use character that is not in `text` for each letter of control tokens."""
        used = set(IS_PRIVATE_USE_A.findall(text))
        free = (char for code in PRIVATE_USE_A if (char := chr(code)) not in used)
        return dict(zip(self._letters, free, strict=False))


# Words of JSON Schema that templates look at; none is part of a control token.
_SCHEMA_WORDS = {
    *("type", "properties", "required", "items", "enum", "description", "anyOf", "$defs", "$ref"),
    *("object", "array", "string", "integer", "number", "boolean", "null"),
}


class Substitution:
    """Substitutes characters in all texts that come from a query, but not in JSON's own syntax.

    Args:
        table: translation table for `str.translate`.
    """

    def __init__(self, table: Mapping[int, str]) -> None:
        self._table = table

    def message(self, message: Message) -> Message:
        """A message with substituted characters."""
        calls = tuple(
            ToolCall(self._text(call.id), self._text(call.name), self._json(call.arguments))
            for call in message.tool_calls
        )
        call_id = self._text(message.tool_call_id)
        return Message(message.role, self._text(message.content), calls, call_id)

    def tools(self, tools: Tools | None) -> Tools | None:
        """Tools with substituted characters."""
        return tools and replace(tools, functions=tuple(map(self._function, tools.functions)))

    def _function(self, function: Function) -> Function:
        parameters = function.parameters and self._json(function.parameters)
        return Function(self._text(function.name), self._text(function.description), parameters)

    def _text(self, text: str) -> str:
        return text.translate(self._table)

    def _json(self, text: str) -> str:
        try:
            return json.dumps(self._value(json.loads(text)), ensure_ascii=False)
        except (ValueError, RecursionError):
            return self._text(text)

    def _value(self, value: object) -> object:
        match value:
            case str():
                return value if value in _SCHEMA_WORDS else self._text(value)
            case list():
                return [self._value(each) for each in value]
            case dict():
                return {self._value(key): self._value(each) for key, each in value.items()}
            case _:
                return value


def _contents(messages: Sequence[Message], tools: Tools | None) -> list[str]:
    """The texts of a conversation that may hold anything; JSON as it is and without escapes."""
    texts = [turn.content for turn in messages]
    calls = [call for turn in messages for call in turn.tool_calls]
    functions = tools.functions if tools else ()
    json_texts = [call.arguments for call in calls] + [f.parameters for f in functions]
    texts += [turn.tool_call_id for turn in messages]
    texts += [text for call in calls for text in (call.id, call.name)]
    texts += [text for f in functions for text in (f.name, f.description)]
    return texts + json_texts + [_unescaped(text) for text in json_texts]


def _unescaped(text: str) -> str:
    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(text), ensure_ascii=False)
    return text


def _secret() -> str:
    """Sixteen unpredictable characters. The module `secrets` takes long to import."""
    numbers = memoryview(os.urandom(64)).cast("I")
    return "".join(chr(PRIVATE_USE_B[number % len(PRIVATE_USE_B)]) for number in numbers)


def _copied(token: AddedToken, content: str, special: bool) -> AddedToken:
    """A token that is recognized in the same circumstances as `token`."""
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=special,
    )


def _any_of(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Matches where the library does: leftmost, longest, single words between word boundaries."""

    def pattern(token: AddedToken) -> str:
        text = re.escape(token.content)
        return rf"(?<!\w){text}(?!\w)" if token.single_word else text

    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile("|".join(map(pattern, longest_first)) or r"(?!)")


def _letters(control_tokens: Iterable[str]) -> list[str]:
    """The characters that control tokens consist of.

    White space counts only for tokens that consist of nothing else, because templates strip it.
    """
    letters: set[str] = set()
    for token in control_tokens:
        letters.update(char for char in token if not char.isspace() or token.isspace())
    return sorted(letters)


def _harmless_unknown(tokenizer: Tokenizer | IndexedTokenizer, mentioned: str) -> set[int]:
    """The id of the unknown token, unless the template also uses that token."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    if not isinstance(unknown, str) or mentioned.count(unknown) > 1:
        return set()
    token_id = tokenizer.token_to_id(unknown)
    return set() if token_id is None else {token_id}
