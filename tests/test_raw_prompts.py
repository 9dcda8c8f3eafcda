"""Raw prompts, which the model continues without a chat template, and scored prompts."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from smolcli.backends.local import LocalBackend, open_local
from smolcli.backends.remote.wire import Dialect, chat_body, parse_record
from smolcli.errors import QueryError
from smolcli.protocol.query import parse_query
from smolcli.settings import EngineSettings, QueryDefaults
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import ErrorCode, FinishReason, Message, Result

WAIT_S = 60
TEXTS = [
    "The capital of France is",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "  a < |im_end|> <|im_end| <|endoftext|>é日\n\n",
]


@pytest.fixture(scope="module")
def backend(tiny_folder: Path) -> Iterator[LocalBackend]:
    settings = EngineSettings(str(tiny_folder), dtype="float32", max_batch_size=4, kv_cache_mb=64)
    with closing(open_local(settings)) as backend:
        yield backend


def answer(backend: LocalBackend, **fields: Any) -> Result:
    query = parse_query({"chat_id": "1", "max_new_tokens": 16} | fields, QueryDefaults())
    return backend.submit(query).result(WAIT_S)


def ids_of(folder: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_raw_prompt_is_encoded_as_the_tokenizer_does_by_itself(
    tiny_folder: Path, text: str
) -> None:
    """Control tokens that are written out count, unlike those in messages."""
    chat = ChatTokenizer.load(tiny_folder)
    query = parse_query({"chat_id": "1", "raw_prompt": text}, QueryDefaults())
    assert chat.encode_query(query) == ids_of(tiny_folder, text)
    assert chat.raw_text(ids_of(tiny_folder, text)) == text


def test_a_raw_prompt_starts_with_the_tokens_that_start_every_text(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Other Llama checkpoints put <s> before every text."""
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    query = parse_query({"chat_id": "1", "raw_prompt": TEXTS[0]}, QueryDefaults())
    ids = ChatTokenizer.load(tmp_path).encode_query(query)
    assert ids == [1, *ids_of(tiny_folder, TEXTS[0])]


def test_a_rendered_conversation_as_raw_prompt_has_the_same_answer(
    backend: LocalBackend, tiny_folder: Path
) -> None:
    chat = ChatTokenizer.load(tiny_folder)
    rendered = chat.render([Message("user", "Why is the sky blue?")])
    expected = answer(backend, user_prompt="Why is the sky blue?")
    for prompt in (rendered, ids_of(tiny_folder, rendered)):
        result = answer(backend, raw_prompt=prompt)
        assert result.response is not None
        assert result.response.strip() == expected.response
        assert result.usage == expected.usage


def test_white_space_of_a_continuation_is_kept(backend: LocalBackend, tiny_folder: Path) -> None:
    """The text and its continuation are one text; answers to messages are stripped."""
    seen: list[str] = []
    fields = {"chat_id": "1", "raw_prompt": TEXTS[0], "choices": ["Paris"]}
    query = parse_query(fields, QueryDefaults())
    assert backend.submit(query, seen.append).result(WAIT_S).response == "Paris" == "".join(seen)
    texts = [answer(backend, raw_prompt=text).response or "" for text in map(str, range(16))]
    assert any(text != text.strip() for text in texts)


@pytest.mark.parametrize("echoes", [True, False])
def test_echo_repeats_the_prompt_before_the_answer(
    backend: LocalBackend, tiny_folder: Path, echoes: bool
) -> None:
    plain = answer(backend, raw_prompt=TEXTS[1])
    for prompt in (TEXTS[1], ids_of(tiny_folder, TEXTS[1])):
        seen: list[str] = []
        fields = {"chat_id": "1", "raw_prompt": prompt, "echo": echoes, "max_new_tokens": 16}
        result = backend.submit(parse_query(fields, QueryDefaults()), seen.append).result(WAIT_S)
        assert result.response == (TEXTS[1] if echoes else "") + str(plain.response)
        assert "".join(seen) == result.response


def test_scoring_generates_nothing(backend: LocalBackend, tiny_folder: Path) -> None:
    """One entry per token; the log probabilities do not depend on whether an answer follows."""
    ids = ids_of(tiny_folder, TEXTS[2])
    results = [
        answer(backend, raw_prompt=TEXTS[2], prompt_logprobs=3, max_new_tokens=num, echo=bool(num))
        for num in (0, 5, 0)
    ]
    first = results[0]
    assert (first.response, first.finish_reason) == ("", FinishReason.LENGTH)
    assert first.usage is not None
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (len(ids), 0)
    assert first.prompt_logprobs == results[1].prompt_logprobs == results[2].prompt_logprobs
    assert first.prompt_logprobs is not None
    assert [entry["token_id"] for entry in first.prompt_logprobs] == ids
    assert b"".join(bytes(entry["bytes"]) for entry in first.prompt_logprobs) == TEXTS[2].encode()
    start, *others = first.prompt_logprobs
    assert (start["logprob"], start["rank"], start["top_logprobs"]) == (None, None, [])
    for entry in others:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        likely = {each["token_id"]: each["logprob"] for each in entry["top_logprobs"]}
        assert (entry["rank"] <= 3) == (entry["token_id"] in likely)
        assert likely.get(entry["token_id"], entry["logprob"]) == entry["logprob"]


def test_the_prompt_of_several_answers_is_scored_once(backend: LocalBackend) -> None:
    result = answer(backend, user_prompt="Hi", prompt_logprobs=0, n=3, temperature=1.0)
    assert result.prompt_logprobs is not None
    assert [each.prompt_logprobs for each in result.alternatives] == [None, None]
    assert json.loads(json.dumps(result.record()))["prompt_logprobs"] == result.prompt_logprobs


@pytest.mark.parametrize("prompt", [[5, 384], "x" * 600, [5] * 513])
def test_a_raw_prompt_that_the_model_cannot_read_is_an_error(
    backend: LocalBackend, prompt: Any
) -> None:
    result = answer(backend, raw_prompt=prompt)
    is_long = len(prompt) > 2
    assert result.error_code == (ErrorCode.PROMPT_TOO_LONG if is_long else ErrorCode.INVALID_VALUE)
    assert result.field == "raw_prompt"


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"raw_prompt": ""}, "raw_prompt", "non-empty"),
        ({"raw_prompt": []}, "raw_prompt", "non-empty"),
        ({"raw_prompt": [1, "a"]}, "raw_prompt", "list of token ids"),
        ({"raw_prompt": "x", "user_prompt": "x"}, "user_prompt", "combined with raw_prompt"),
        ({"raw_prompt": "x", "system_prompt": ""}, "system_prompt", "combined with raw_prompt"),
        ({"user_prompt": "x", "echo": True}, "echo", "requires raw_prompt"),
        ({"raw_prompt": "x", "max_new_tokens": 0}, "max_new_tokens", "requires prompt_logprobs"),
    ],
)
def test_invalid_combinations_name_the_field(fields: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(QueryError, match=said) as caught:
        parse_query({"chat_id": "1"} | fields, QueryDefaults())
    assert caught.value.field == field


@pytest.mark.parametrize("prompt", [TEXTS[1], [1, 5, 6]])
def test_smol_servers_take_raw_prompts_and_scores_as_they_are(prompt: Any) -> None:
    fields = {"chat_id": "1", "raw_prompt": prompt, "echo": True, "prompt_logprobs": 2}
    query = parse_query(fields, QueryDefaults())
    body = json.loads(json.dumps(chat_body(query, Dialect.SMOL)))
    assert parse_query(body, QueryDefaults()) == query
    entries: list[Any] = [{"token": "a", "logprob": None, "top_logprobs": []}]
    record = {"chat_id": "1", "response": " x ", "prompt_logprobs": entries}
    result = parse_record(record, query, Dialect.SMOL)
    assert (result.response, result.prompt_logprobs, result.echo) == (" x ", entries, True)


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        (Dialect.PLAIN, {"raw_prompt": "x"}),
        (Dialect.PLAIN, {"user_prompt": "x", "prompt_logprobs": 0}),
        (Dialect.OPENAI, {"raw_prompt": "x", "prompt_logprobs": 0}),
    ],
)
def test_other_servers_get_no_query_that_they_would_misread(
    dialect: Dialect, fields: dict[str, Any]
) -> None:
    query = parse_query({"chat_id": "1"} | fields, QueryDefaults())
    with pytest.raises(QueryError, match="does not support"):
        chat_body(query, dialect)
