"""The tokenizer equals transformers' in both directions, whole and incrementally."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from smolcli.errors import ModelError, PromptTooLong, QueryError, UsageError
from smolcli.protocol.query import parse_query
from smolcli.settings import QueryDefaults
from smolcli.text.chat_template import NAMED_TEMPLATES
from smolcli.text.prompt_encoder import HUGE_TEXT
from smolcli.text.tokenizer import ChatTokenizer, context_length
from smolcli.text.vocabulary_index import longest_token
from smolcli.types import Message, PromptLimit

TEXTS = [
    "What is the capital of France?",
    "In 1234 days, there's a café.\n\n  Ok   1  22   333",
    "a  1",
    "   leading and trailing   ",
    "tabs\tand\r\nlines\n\n\n",
    "👩‍👩‍👧 emoji 🇨🇭, 日本語, العربية, ñ and e\u0301",
    "def f(x):\n    return x ** 2  # 1_000_000",
    "<html> | <|im_start <im_end|> <|",
    "{{ 7 * 7 }} {% raw %}",
    "\x00\x7f\u200b\ufeff\ufffd",
    "!" * 300,
]

CONVERSATIONS = [
    *([Message("user", text)] for text in TEXTS),
    *([Message("system", text), Message("user", "Go on.")] for text in TEXTS),
    [Message("user", "\n".join(TEXTS) * 20)],
    [Message("user", "Hi"), Message("assistant", "Hello! 1 2 3"), Message("user", "Bye  9")],
    [Message("system", ""), Message("user", "x")],
    [Message("assistant", "first"), Message("user", "second")],
]

text_or_rare = st.one_of(st.text(max_size=40), st.sampled_from(TEXTS))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_folder)


def copy_tokenizer(folder: Path, target: Path) -> Path:
    """Copy the tokenizer's files, for a test to change."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, target / name)
    return target


def assert_equals_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, reference = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        expected: Any = reference.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.encode(messages) == expected, messages
        assert tokenizer.decode(expected) == reference.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_encode_and_decode_equal_transformers_on_the_tiny_model(tiny_folder: Path) -> None:
    assert_equals_transformers(tiny_folder)


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: ChatTokenizer) -> None:
    """A prompt of 6 MB stopped a whole server, health checks and streams included, for 30 s."""
    started = threading.Event()

    def encode() -> None:
        started.set()
        tokenizer.encode_text("a " * 400_000)

    thread = threading.Thread(target=encode)
    thread.start()
    started.wait()
    num_turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 5


def test_a_prompt_that_no_tokens_could_make_short_enough_is_not_encoded(
    tiny_folder: Path,
) -> None:
    """Three million tokens took 1.4 GB of memory before they were rejected."""
    source = json.loads((tiny_folder / "tokenizer.json").read_text("utf-8"))
    longest = max((token["content"] for token in source["added_tokens"]), key=len)
    assert longest_token(source) == len(longest)
    chat = ChatTokenizer.load(tiny_folder)
    num_tokens = HUGE_TEXT // len(longest) + 1
    query = parse_query({"chat_id": "1", "raw_prompt": longest * num_tokens}, QueryDefaults())
    assert len(chat.encode_query(query, PromptLimit(num_tokens))) == num_tokens
    with pytest.raises(PromptTooLong, match=f"it has at least {num_tokens} tokens"):
        chat.encode_query(query, PromptLimit(num_tokens - 1))
    with pytest.raises(PromptTooLong, match="it has at least"):
        chat.encode([Message("user", "a " * HUGE_TEXT)], limit=PromptLimit(1000))
    assert len(chat.encode([Message("user", "a " * HUGE_TEXT)])) > HUGE_TEXT


@pytest.mark.model
def test_encode_and_decode_equal_transformers_on_the_real_model(model_folder: Path) -> None:
    assert_equals_transformers(model_folder)


@pytest.mark.model
def test_real_model_splits_digits(model_folder: Path) -> None:
    """Conversion by transformers lost SmolLM2's Digits step, which changed the tokens of "a  1"."""
    ids = ChatTokenizer.load(model_folder).encode([Message("user", "a  1 22")])
    tokenizer = ChatTokenizer.load(model_folder)
    pieces = [tokenizer.decode([token_id]) for token_id in ids]
    assert pieces[pieces.index("a") :][:6] == ["a", "  ", "1", " ", "2", "2"]


@given(data=st.data())
def test_incremental_decoding_equals_decoding_at_once(
    tokenizer: ChatTokenizer, data: st.DataObject
) -> None:
    """Most of the 384 tokens are single bytes, so most sequences are invalid UTF-8."""
    token_ids = data.draw(st.lists(st.integers(0, 383), max_size=60))
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(token_ids)


@given(text=text_or_rare)
def test_incremental_decoding_never_splits_a_character(tokenizer: ChatTokenizer, text: str) -> None:
    token_ids = tokenizer.encode([Message("user", text)])
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token_id) for token_id in token_ids]
    whole = "".join(pieces) + decoder.flush()
    assert whole == tokenizer.decode(token_ids)
    assert whole.count("\ufffd") == text.count("\ufffd")


def test_character_is_emitted_once_complete(tokenizer: ChatTokenizer) -> None:
    *_, end = prompt = tokenizer.encode([Message("user", "𐍈𐍈")])
    start = next(i for i, token_id in enumerate(prompt) if tokenizer.decode([token_id]) == "\ufffd")
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token_id) for token_id in prompt[start : start + 8]]
    assert pieces == ["", "", "", "𐍈"] * 2
    assert decoder.push(end) == "\n"
    assert decoder.flush() == ""


def test_flush_replaces_an_incomplete_character(tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.encode([Message("user", "é日")])
    cut = next(i for i, token_id in enumerate(prompt) if tokenizer.decode([token_id]) == "\ufffd")
    decoder = tokenizer.decoder()
    assert decoder.push(prompt[cut]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_encode_is_thread_safe(tokenizer: ChatTokenizer) -> None:
    expected = [tokenizer.encode(messages) for messages in CONVERSATIONS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert list(pool.map(tokenizer.encode, CONVERSATIONS)) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{% for _ in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_template_rejection_is_a_query_error(
    tiny_folder: Path, tmp_path: Path, template: str, reason: str
) -> None:
    (copy_tokenizer(tiny_folder, tmp_path) / "chat_template.jinja").write_text(template)
    with pytest.raises(QueryError, match=reason) as caught:
        ChatTokenizer.load(tmp_path).encode([Message("user", "Hi")])
    assert caught.value.field == "messages"
    assert caught.value.code == "invalid_value"


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [{"name": "default", "template": t}]])
def test_template_may_be_in_the_tokenizer_config(
    tiny_folder: Path, tmp_path: Path, wrap: Callable[[str], Any]
) -> None:
    """Older models store the template there and special tokens as objects."""
    folder = copy_tokenizer(tiny_folder, tmp_path)
    (folder / "chat_template.jinja").unlink()
    template = wrap(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ 'é'|tojson }}"
    )
    config = {"chat_template": template, "bos_token": {"content": "<|im_start|>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ChatTokenizer.load(folder)
    ids = tokenizer.encode([Message("user", "Hi")])
    assert ids[0] == 1
    assert tokenizer.decode(ids) == 'Hi"é"'


def test_invalid_tokenizer_files_are_model_errors(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(tiny_folder, tmp_path)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match=r"chat template in .* is invalid"):
        ChatTokenizer.load(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(QueryError, match="no chat template"):
        ChatTokenizer.load(folder).encode([Message("user", "Hi")])
    with pytest.raises(UsageError, match="the given chat template is invalid"):
        ChatTokenizer.load(folder, "{% for %}")
    named = ChatTokenizer.load(folder, NAMED_TEMPLATES["chatml"])
    assert named.encode([Message("user", "Hi")])
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not contain a JSON object"):
        ChatTokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a valid tokenizer"):
        ChatTokenizer.load(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": [1]},
        {"chat_template": [{"name": "default"}]},
        {"bos_token": {}},
        {"bos_token": 1},
    ],
)
def test_malformed_tokenizer_settings_count_as_absent(
    tiny_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = copy_tokenizer(tiny_folder, tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(QueryError, match="no chat template"):
        ChatTokenizer.load(folder).encode([Message("user", "Hi")])


def test_context_length_is_read_from_the_config(tiny_folder: Path, tmp_path: Path) -> None:
    assert context_length(tiny_folder) == 512
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        context_length(tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "many"}')
    with pytest.raises(ModelError, match="no valid max_position_embeddings"):
        context_length(tmp_path)


def test_tokenizer_with_more_tokens_than_the_model_is_rejected(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Their ids once reached the embedding, whose size was not checked."""
    folder = copy_tokenizer(tiny_folder, tmp_path)
    for size in (384, 400):
        (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
        assert ChatTokenizer.load(folder).encode([Message("user", "Hi")])
    (folder / "config.json").write_text(json.dumps({"vocab_size": 383}))
    with pytest.raises(ModelError, match=r"token ids up to 383, .* vocab_size 383"):
        ChatTokenizer.load(folder)


def test_added_token_beyond_the_embedding_is_rejected_unless_it_is_padding(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = copy_tokenizer(tiny_folder, tmp_path)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 384}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="token ids up to 384"):
        ChatTokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    ChatTokenizer.load(folder)
    (folder / "chat_template.jinja").write_text("{{ pad_token }}")
    with pytest.raises(QueryError, match="no embedding for the token 384"):
        ChatTokenizer.load(folder).encode([Message("user", "Hi")])


def test_sparse_ids_are_checked_in_each_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(tiny_folder, tmp_path)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 384}))
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    values["model"]["vocab"]["z"] = 9999
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = ChatTokenizer.load(folder)
    assert tokenizer.encode([Message("user", "a")])
    with pytest.raises(QueryError, match="no embedding for the token 9999"):
        tokenizer.encode([Message("user", "z")])
