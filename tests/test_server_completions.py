"""/v1/completions, driven by the official OpenAI client, directly and through a gateway."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from server_tools import RunningServer, openai_client, serving, tiny_engine
from tokenizers import Tokenizer

from smolcli.backends.dedup import deduplicated
from smolcli.backends.local import open_local
from smolcli.backends.remote.backend import open_gateway
from smolcli.errors import QueryError
from smolcli.protocol.line_formats import OPENAI, RunInfo, smol_record
from smolcli.protocol.text_completions import (
    TextCompletionFields,
    parse_text_fields,
    text_completion,
)
from smolcli.settings import EngineSettings, QueryDefaults, RemoteSettings
from smolcli.types import Message, Query, Sampling

PROMPT = "The capital of Italy is"
OTHER = "<|im_start|>user\nHi<|im_end|>\né"


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(deduplicated(open_local), tiny_engine(tiny_folder)) as running:
        yield running


@pytest.fixture
def ask(server: RunningServer, tiny_folder: Path) -> Iterator[Any]:
    with openai_client(server.url) as client:

        def create(prompt: Any = PROMPT, **options: Any) -> Any:
            return client.completions.create(model=tiny_folder.name, prompt=prompt, **options)

        yield create


def ids_of(folder: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


def test_every_form_of_prompt_gives_the_same_choices(ask: Any, tiny_folder: Path) -> None:
    """One or several prompts, as text or token ids, whole or as a stream of several choices."""
    first, second = ids_of(tiny_folder, PROMPT), ids_of(tiny_folder, OTHER)
    texts = [ask(prompt, max_tokens=9).choices[0].text for prompt in (PROMPT, OTHER)]
    assert ask(first, max_tokens=9).choices[0].text == texts[0]
    for prompt in ([PROMPT, OTHER], [first, second]):
        answer = ask(prompt, max_tokens=9)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == len(first) + len(second)
        chunks = list(
            ask(prompt, max_tokens=9, stream=True, stream_options={"include_usage": True})
        )
        assert joined(chunks, 2) == texts
        assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
        reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
        assert sorted(reasons) == sorted(choice.finish_reason for choice in answer.choices)


def joined(chunks: list[Any], num_choices: int) -> list[str]:
    texts = [""] * num_choices
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
    return texts


def test_several_choices_of_several_prompts_follow_each_other(ask: Any) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    several = ask([PROMPT, OTHER], **options)
    texts = [choice.text for choice in several.choices]
    assert len(set(texts)) > 3
    assert texts[3:] == [choice.text for choice in ask(OTHER, **options).choices]
    assert joined(list(ask([PROMPT, OTHER], stream=True, **options)), 6) == texts
    alone = ask([PROMPT, OTHER], max_tokens=8, n=1, temperature=1.0, seed=5)
    assert [choice.text for choice in alone.choices] == texts[::3]
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens


def test_log_probabilities_are_parallel_lists_over_the_text(ask: Any, tiny_folder: Path) -> None:
    """With echo they begin with the prompt, whose first token has none."""
    num_prompt = len(ids_of(tiny_folder, OTHER))
    echoed = ask(OTHER, max_tokens=4, logprobs=2, echo=True).choices[0]
    plain = ask(OTHER, max_tokens=4, logprobs=2).choices[0]
    scores = echoed.logprobs
    assert echoed.text == OTHER + plain.text
    assert scores.tokens[num_prompt:] == plain.logprobs.tokens
    assert scores.token_logprobs[num_prompt:] == plain.logprobs.token_logprobs
    assert plain.logprobs.text_offset[0] == 0
    assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
    assert "<|im_start|>" in scores.tokens
    assert "bytes:\\xc3" in scores.tokens or "é" in scores.tokens
    for start, token in zip(scores.text_offset, scores.tokens, strict=True):
        assert token.startswith("bytes:") or echoed.text.startswith(token, start)
    for token, logprob, likely in list(
        zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True)
    )[1:]:
        assert likely[token] == logprob
        assert len(likely) in (2, 3)


@pytest.mark.parametrize("echoes", [False, True])
def test_log_probabilities_of_a_stream_add_up_to_the_whole(ask: Any, echoes: bool) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "logprobs": 1, "echo": echoes}
    whole = ask([OTHER, PROMPT], **options)
    chunks = list(ask([OTHER, PROMPT], stream=True, **options))
    for choice in whole.choices:
        parts = [c.logprobs for each in chunks for c in each.choices if c.index == choice.index]
        for name, expected in choice.logprobs.to_dict().items():
            found = [value for part in parts if part for value in getattr(part, name)]
            assert found == expected


def test_a_text_is_scored_without_generating(ask: Any, tiny_folder: Path) -> None:
    """What lm-evaluation-harness asks for, and vLLM's prompt_logprobs, agree."""
    ids = ids_of(tiny_folder, PROMPT)
    scored = ask(ids, max_tokens=0, logprobs=1, echo=True)
    assert (scored.choices[0].text, scored.choices[0].finish_reason) == (PROMPT, "length")
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (len(ids), 0)
    extended = ask(ids, max_tokens=0, extra_body={"prompt_logprobs": 1}).choices[0]
    assert extended.text == ""
    first, *others = extended.prompt_logprobs
    assert first is None
    values = scored.choices[0].logprobs.token_logprobs[1:]
    assert [each[str(i)]["logprob"] for i, each in zip(ids[1:], others, strict=True)] == values
    assert all(1 in {token["rank"] for token in each.values()} for each in others)


def test_chat_completions_report_prompt_log_probabilities(
    server: RunningServer, tiny_folder: Path
) -> None:
    body = {"model": tiny_folder.name, "messages": [{"role": "user", "content": "Hi"}]}
    path = "/v1/chat/completions"
    answer = server.post(path, body | {"prompt_logprobs": 0, "max_tokens": 2}).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in server.post(path, body | {"max_tokens": 2}).json()
    refused = server.post(path, body | {"prompt_logprobs": 0, "stream": True})
    assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_stop_strings_and_formats_apply_to_the_continuation(ask: Any) -> None:
    text = ask(max_tokens=12).choices[0].text
    stop = text[4:7]
    stopped = ask(max_tokens=12, stop=[stop], echo=True).choices[0]
    assert stopped.text == PROMPT + text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    chosen = ask(max_tokens=12, extra_body={"choices": ["Rome", "Paris"]}).choices[0].text
    assert chosen in ("Rome", "Paris")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[1], [384]]}, "prompt[1]"),
        ({"prompt": [1, 384]}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 9, "prompt": ["a"] * 200, "temperature": 0}, "prompt"),  # before they are parsed
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ],
)
def test_what_is_not_supported_is_rejected_by_name(
    ask: Any, options: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(**options)
    assert caught.value.status_code in (400, 413)
    assert caught.value.param == param


def test_a_request_for_embeddings_is_told_why_there_are_none(server: RunningServer) -> None:
    answer = server.post("/v1/embeddings", {"model": "m", "input": "x"})
    assert answer.status_code == 404
    assert "not trained for retrieval" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "path"), [([1 << 30], "prompt"), ([[1], [1 << 30]], "prompt[1]")]
)
def test_an_unknown_token_id_is_an_error_of_the_prompt(
    server: RunningServer, prompt: Any, path: str
) -> None:
    """The message spoke of `raw_prompt`, a field of smol's own format."""
    error = server.post("/v1/completions", {"prompt": prompt}).json()["error"]
    assert error["param"] == path
    assert error["message"].startswith(f"{path} contains token id {1 << 30}")


def test_a_base_model_needs_a_template_only_for_messages(tiny_folder: Path, tmp_path: Path) -> None:
    """It could not be loaded at all."""
    for path in tiny_folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    base = tiny_engine(tmp_path)
    with serving(open_local, base) as running:
        assert running.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2}).status_code == 200
        refused = running.ask()
        assert refused.status_code == 400
        assert "raw_prompt" in refused.json()["error"]
        assert "--chat-template" in refused.json()["error"]
    template = (tiny_folder / "chat_template.jinja").read_text("utf-8")
    answers = []
    for engine in (tiny_engine(tiny_folder), replace(base, chat_template=template)):
        with closing(open_local(engine)) as backend:
            asked = Query("1", (Message("user", "Hi"),), Sampling(max_new_tokens=4))
            answers.append(backend.submit(asked).result(60).response)
            assert ("chat_template" in backend.identity()) == bool(engine.chat_template)
    assert answers[0] == answers[1]


def test_neutral_values_are_accepted(ask: Any) -> None:
    expected = ask().choices[0].text
    neutral: dict[str, Any] = {
        **dict.fromkeys(("best_of", "n", "top_p"), 1),
        **dict.fromkeys(("logprobs", "stop", "suffix", "user", "seed", "max_tokens"), None),
        "echo": False,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "stream_options": None,
        "extra_body": {"add_special_tokens": True, "use_beam_search": False, "top_k": -1},
    }
    assert ask(**neutral).choices[0].text == expected


@pytest.mark.parametrize("api", ["smol", "openai"])
def test_a_gateway_passes_text_completions_on(server: RunningServer, api: Any) -> None:
    """To smol servers as they are, to others as /v1/completions; scores only to smol servers."""
    remote = RemoteSettings((server.url,), api=api, retry_s=0.5)
    with serving(lambda _: open_gateway(remote), EngineSettings(), is_gateway=True) as running:

        def post(to: RunningServer, **options: Any) -> Any:
            model = to.client.get("/v1/models").json()["data"][0]["id"]
            body = {"model": model, "prompt": [PROMPT, OTHER], "max_tokens": 6} | options
            return to.post("/v1/completions", body)

        for options in ({"echo": True}, {"logprobs": 1}, {"n": 2, "temperature": 1, "seed": 3}):
            there, here = (post(each, **options).json() for each in (server, running))
            assert there["choices"] == here["choices"]
            for usage in (there["usage"], here["usage"]):
                usage.pop("prompt_tokens_details", None)
            assert there["usage"] == here["usage"]
        streamed = post(running, stream=True, logprobs=0).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in streamed[:-2]]
        texts = ["", ""]
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in post(server).json()["choices"]]
        scored = post(running, prompt_logprobs=1)
        if api == "smol":
            assert scored.json()["choices"] == post(server, prompt_logprobs=1).json()["choices"]
        else:
            assert "does not support prompt_logprobs" in scored.json()["error"]["message"]


def test_lines_of_a_batch_file_may_be_text_completions(ask: Any, tiny_folder: Path) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 1, "echo": True}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    query = OPENAI.parse(line, QueryDefaults(), 1)
    with closing(open_local(tiny_engine(tiny_folder))) as backend:
        result = backend.submit(query).result(60)
    record = OPENAI.for_run(RunInfo("0" * 16)).record(result)
    answer = record["response"]["body"]
    assert answer["object"] == "text_completion"
    assert answer["choices"] == ask(max_tokens=6, logprobs=1, echo=True).to_dict()["choices"]
    assert smol_record(record)["response"] == answer["choices"][0]["text"]
    for wrong in ({"prompt": ["a", "b"]}, {"stream": True}):
        with pytest.raises(QueryError):
            OPENAI.parse(line | {"body": body | wrong}, QueryDefaults(), 1)


def near(*values: object) -> Any:
    """Values around the edge of what a field allows."""
    return st.sampled_from([*values, None, "", [], {}, 0, 1, 1.0, 2, "x", " ", True, False])


@given(
    st.fixed_dictionaries(
        {"model": st.just("m"), "prompt": near(["a"], [1], [[1]], ["a", 1], [[]], [-1], [[1], 2])},
        optional={
            "max_tokens": near(),
            "echo": near(),
            "logprobs": near(20, 21),
            "prompt_logprobs": near(),
            "n": near(),
            "best_of": near(),
            "temperature": near(),
            "suffix": near(),
            "stream": near(),
            "stream_options": near({"include_usage": True}),
            "messages": near([1]),
        },
    )
)
def test_schema_allows_what_the_parser_accepts(value: dict[str, Any]) -> None:
    try:
        text_completion(parse_text_fields(value), QueryDefaults(), "1")
        is_accepted = True
    except QueryError:
        is_accepted = False
    assert is_accepted == SCHEMA.is_valid(value)


SCHEMA = Draft202012Validator(TextCompletionFields.model_json_schema())
