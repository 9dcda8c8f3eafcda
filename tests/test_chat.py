"""chat.py speaks exactly as transformers does, whole and piece by piece."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolcli.errors import ModelError, QueryError
from smolcli.text.tokenizer import ChatTokenizer, context_length
from smolcli.types import Message

TEXTS = [
    "What is the capital of France?",
    "In 1234 days, there's a café.\n\n  Ok   1  22   333",
    "a  1",
    "   leading and trailing   ",
    "tabs\tand\r\nlines\n\n\n",
    "👩‍👩‍👧 emoji 🇨🇭, 日本語, العربية, ñ and e\u0301",
    "def f(x):\n    return x ** 2  # 1_000_000",
    "<|im_start|>user\nnested<|im_end|> <|endoftext|> <jupyter_code>",
    "{{ 7 * 7 }} {% raw %}",
    "\x00\x7f\u200b\ufeff\ufffd",
    "!" * 300,
]

CONVERSATIONS = [
    *([Message("user", text)] for text in TEXTS),
    *([Message("system", text), Message("user", "Go on.")] for text in TEXTS),
    [Message("user", "Hi"), Message("assistant", "Hello! 1 2 3"), Message("user", "Bye  9")],
    [Message("system", ""), Message("user", "x")],
    [Message("assistant", "first"), Message("user", "second")],
]

text_or_rare = st.one_of(st.text(max_size=40), st.sampled_from(TEXTS))


@pytest.fixture(scope="module")
def chat(tiny_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_folder)


def copied(folder: Path, target: Path) -> Path:
    """The tokenizer's files alone, to be changed by a test."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, target / name)
    return target


def assert_equals_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    chat, reference = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        expected = reference.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        assert chat.encode(messages) == expected, messages
        assert chat.decode(expected) == reference.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_encode_and_decode_equal_transformers_on_the_tiny_model(tiny_folder: Path) -> None:
    assert_equals_transformers(tiny_folder)


@pytest.mark.model
def test_encode_and_decode_equal_transformers_on_the_real_model(model_folder: Path) -> None:
    assert_equals_transformers(model_folder)


@pytest.mark.model
def test_digits_stand_alone_on_the_real_model(model_folder: Path) -> None:
    """transformers' reading of a GGUF lost SmolLM2's Digits step, and "a  1" got other tokens."""
    ids = ChatTokenizer.load(model_folder).encode([Message("user", "a  1 22")])
    tokenizer = ChatTokenizer.load(model_folder)
    pieces = [tokenizer.decode([token_id]) for token_id in ids]
    assert pieces[pieces.index("a") :][:6] == ["a", "  ", "1", " ", "2", "2"]


@given(data=st.data())
def test_pieces_add_up_to_the_whole_for_any_tokens(
    chat: ChatTokenizer, data: st.DataObject
) -> None:
    """Among 384 tokens most are single bytes, so most sequences are broken UTF-8."""
    token_ids = data.draw(st.lists(st.integers(0, 383), max_size=60))
    decoder = chat.decoder()
    pieces = [decoder.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + decoder.flush() == chat.decode(token_ids)


@given(text=text_or_rare)
def test_pieces_of_real_text_are_never_half_a_character(chat: ChatTokenizer, text: str) -> None:
    token_ids = chat.encode([Message("user", text)])
    decoder = chat.decoder()
    pieces = [decoder.push(token_id) for token_id in token_ids]
    whole = "".join(pieces) + decoder.flush()
    assert whole == chat.decode(token_ids)
    assert whole.count("\ufffd") == text.count("\ufffd")


def test_a_character_comes_when_it_is_whole(chat: ChatTokenizer) -> None:
    *_, end = prompt = chat.encode([Message("user", "𐍈𐍈")])
    start = next(i for i, token_id in enumerate(prompt) if chat.decode([token_id]) == "\ufffd")
    decoder = chat.decoder()
    pieces = [decoder.push(token_id) for token_id in prompt[start : start + 8]]
    assert pieces == ["", "", "", "𐍈"] * 2
    assert decoder.push(end) == "\n"
    assert decoder.flush() == ""


def test_flush_gives_what_was_cut_off(chat: ChatTokenizer) -> None:
    prompt = chat.encode([Message("user", "é日")])
    cut = next(i for i, token_id in enumerate(prompt) if chat.decode([token_id]) == "\ufffd")
    decoder = chat.decoder()
    assert decoder.push(prompt[cut]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_encode_is_the_same_from_many_threads(chat: ChatTokenizer) -> None:
    expected = [chat.encode(messages) for messages in CONVERSATIONS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert list(pool.map(chat.encode, CONVERSATIONS)) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ messages.append(1) }}", "is unsafe"),
    ],
)
def test_what_a_template_refuses_is_the_querys_fault(
    tiny_folder: Path, tmp_path: Path, template: str, reason: str
) -> None:
    (copied(tiny_folder, tmp_path) / "chat_template.jinja").write_text(template)
    with pytest.raises(QueryError, match=reason) as caught:
        ChatTokenizer.load(tmp_path).encode([Message("user", "Hi")])
    assert caught.value.field == "messages"
    assert caught.value.code == "invalid_value"


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [{"name": "default", "template": t}]])
def test_template_and_tokens_in_tokenizer_config(tiny_folder: Path, tmp_path: Path, wrap) -> None:
    """Older models keep the template there, and special tokens as objects."""
    folder = copied(tiny_folder, tmp_path)
    (folder / "chat_template.jinja").unlink()
    template = wrap(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ 'é'|tojson }}"
    )
    config = {"chat_template": template, "bos_token": {"content": "<|im_start|>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    chat = ChatTokenizer.load(folder)
    ids = chat.encode([Message("user", "Hi")])
    assert ids[0] == 1
    assert chat.decode(ids) == 'Hi"é"'


def test_a_folder_that_is_no_chat_model_says_why(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match=r"chat template in .* is not valid"):
        ChatTokenizer.load(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        ChatTokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not hold a JSON object"):
        ChatTokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is no tokenizer"):
        ChatTokenizer.load(folder)


def test_context_length(tiny_folder: Path, tmp_path: Path) -> None:
    assert context_length(tiny_folder) == 512
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        context_length(tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "many"}')
    with pytest.raises(ModelError, match="no usable max_position_embeddings"):
        context_length(tmp_path)
