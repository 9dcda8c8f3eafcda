"""The text of a message never becomes a control token, whatever the tokenizer and template do."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from smolcli.errors import QueryError
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<pad>"]
ROLES = ["system", "user", "assistant"]
START = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
TEMPLATES = {
    "plain": START + "{{ m.content }}" + END,
    "trim": START + "{{ m.content | trim }}" + END,
    "spaces removed": START + "{{ m.content | replace(' ', '') }}" + END,
    "upper": START + "{{ m.content | upper | lower }}" + END,
    "json": START + "{{ m.content | tojson }}" + END,
    "seams": "<|im_start|>{% for m in messages %}{{ m.content }}{% endfor %}|>",
    "thoughts removed": START + "{{ m.content.split('</think>')[-1].lstrip('\n') }}" + END,
    "letter by letter": START + "{% for c in m.content %}{{ c }}{% endfor %}" + END,
}
FRAGMENTS = [
    *CONTROL,
    *(token[:-2] for token in CONTROL),
    *(token[1:] for token in CONTROL),
    *("<|im_ start|>", "<|IM_END|>", "im_start", "<|", "|>", "\uff1c|im_end|\uff1e", "\U000f0001"),
    *(" ", "\n", "word", "1 ", "日本", "é", "<0x0A>", "\u2581"),
]
contents = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), st.text(max_size=20)
)
conversations = st.lists(st.tuples(st.sampled_from(ROLES), contents), min_size=1, max_size=3)


def byte_level() -> Tokenizer:
    """As SmolLM2: control tokens are part of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*CONTROL, *alphabet])}
    merges = [("i", "m"), ("Ġ", "w"), ("o", "r"), ("Ċ", "Ċ"), ("<", "|"), ("|", ">")]
    vocab |= {a + b: len(vocab) + index for index, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def not_special() -> Tokenizer:
    """Control tokens that are added to the vocabulary without being marked as special."""
    tokenizer = byte_level()
    text = json.loads(tokenizer.to_str())
    for token in text["added_tokens"]:
        token["special"] = token["content"] == "<pad>"
    return Tokenizer.from_str(json.dumps(text))


def sentencepiece() -> Tokenizer:
    """As Llama 2: spaces are letters, the first piece gets one, and bytes are a fallback."""
    letters = ["\u2581", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate(["<unk>", *CONTROL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<unk>", *CONTROL])
    return tokenizer


def normalizing() -> Tokenizer:
    """Control tokens are recognized after normalization, and swallow the spaces around them."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFKC()
    text = json.loads(tokenizer.to_str())
    for token in text["added_tokens"]:
        token |= {"normalized": True, "lstrip": True, "rstrip": token["content"] == "<|im_start|>"}
    return Tokenizer.from_str(json.dumps(text))


def whole_words() -> Tokenizer:
    """A word of the vocabulary is taken as it is, control tokens included."""
    tokenizer = byte_level()
    text = json.loads(tokenizer.to_str())
    text["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(text))
    split = pre_tokenizers.WhitespaceSplit()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    return tokenizer


TOKENIZERS = [byte_level, not_special, sentencepiece, normalizing, whole_words]


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda make: make.__name__)
def tokenizers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, dict[str, ChatTokenizer]]:
    """One of the tokenizers, and ours with each of the templates."""
    plain, ours = request.param(), {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp("chat")
        plain.save(str(folder / "tokenizer.json"))
        mentions_all = "{# " + " ".join(CONTROL) + " #}"
        (folder / "chat_template.jinja").write_text(mentions_all + template, "utf-8")
        ours[name] = ChatTokenizer.load(folder)
    return plain, ours


def control_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    control = {tokenizer.token_to_id(token) for token in CONTROL}
    return [token_id for token_id in ids if token_id in control]


def control_ids_of_template(
    tokenizer: Tokenizer, chat: ChatTokenizer, turns: list[tuple[str, str]]
) -> list[int]:
    return control_ids(tokenizer, chat.encode([Message(role, "x") for role, _ in turns]))


@settings(max_examples=40)
@given(turns=conversations)
def test_contents_never_produce_control_tokens(
    tokenizers: tuple[Tokenizer, dict[str, ChatTokenizer]], turns: list[tuple[str, str]]
) -> None:
    """`<|im_end|>` followed by `<|im_start|>system` in a user's message was a system turn."""
    plain, messages = tokenizers[0], [Message(*turn) for turn in turns]
    for template, chat in tokenizers[1].items():
        expected = control_ids_of_template(plain, chat, turns)
        try:
            found = chat.encode(messages)
        except QueryError:
            # The vocabulary itself turns text into a control token.
            assert plain.model.ignore_merges, template
        else:
            assert control_ids(plain, found) == expected, template


@settings(max_examples=40)
@given(turns=conversations)
def test_ordinary_text_is_encoded_as_by_the_tokenizer_alone(
    tokenizers: tuple[Tokenizer, dict[str, ChatTokenizer]], turns: list[tuple[str, str]]
) -> None:
    plain, messages = tokenizers[0], [Message(*turn) for turn in turns]
    if any(token in content for token in CONTROL for _, content in turns):
        return
    for template, chat in tokenizers[1].items():
        expected = plain.encode(chat.render(messages), add_special_tokens=False).ids
        if control_ids(plain, expected) == control_ids_of_template(plain, chat, turns):
            assert chat.encode(messages) == expected, template


@given(turns=conversations)
def test_control_tokens_come_only_from_the_template(
    tiny_folder: Path, turns: list[tuple[str, str]]
) -> None:
    chat = ChatTokenizer.load(tiny_folder)
    ids = chat.encode([Message(*turn) for turn in turns])
    has_system = turns[0][0] == "system"
    assert [i for i in ids if i < 3] == [1, 2] * (len(turns) + (not has_system)) + [1]
    assert chat.decode([i for i in ids if i > 2]).count("<|im_") == sum(
        content.count("<|im_") for _, content in turns
    )
