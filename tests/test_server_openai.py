"""/v1, driven by the official OpenAI client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types import CompletionUsage
from pydantic import BaseModel, Field
from server_tools import FaultyBackend, RunningServer, openai_client, query, serving, tiny_engine

from smolcli.backends.local import open_local

MESSAGES: Any = [{"role": "user", "content": "What is gravity?"}]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(open_local, tiny_engine(tiny_folder)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as client:
        yield client


def totals(usage: CompletionUsage | None) -> CompletionUsage | None:
    """Usage without what depends on earlier requests."""
    return usage and usage.model_copy(update={"prompt_tokens_details": None})


def test_models_lists_the_model(client: openai.OpenAI, tiny_folder: Path) -> None:
    (model,) = client.models.list().data
    assert model.id == tiny_folder.name
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' not found"):
        client.models.retrieve("gpt-4")


def test_a_completion_equals_the_answer_of_chat(
    client: openai.OpenAI, server: RunningServer, tiny_folder: Path
) -> None:
    answer = client.chat.completions.create(
        model=tiny_folder.name, messages=MESSAGES, max_tokens=6, temperature=0
    )
    expected = server.ask("What is gravity?").json()
    assert answer.choices[0].message.content == expected["response"]
    assert answer.choices[0].finish_reason == expected["finish_reason"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == expected["usage"]["completion_tokens"]
    assert answer.usage.total_tokens == sum(expected["usage"].values())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": ""}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_the_model_may_be_omitted(
    server: RunningServer, tiny_folder: Path, path: str, fields: dict[str, Any]
) -> None:
    """As in vLLM and llama.cpp: there is only one."""
    assert server.post(path, fields).json()["model"] == tiny_folder.name


def test_usage_counts_what_the_prefix_cache_held(server: RunningServer) -> None:
    def cached_tokens(max_tokens: int) -> Any:
        asked = {"messages": MESSAGES, "max_tokens": max_tokens, "n": 2, "temperature": 1}
        usage = server.post("/v1/chat/completions", asked).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    first, second = cached_tokens(1), cached_tokens(2)
    assert 0 <= first <= second
    assert second > 0


def test_a_returned_message_may_be_sent_back(client: openai.OpenAI, tiny_folder: Path) -> None:
    """The client echoes every field of the message that the server sent."""
    first = client.chat.completions.create(model=tiny_folder.name, messages=MESSAGES, max_tokens=6)
    messages = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "Go on."}]
    assert client.chat.completions.create(
        model=tiny_folder.name, messages=messages, max_tokens=6
    ).choices


def test_messages_of_the_clients_helpers_may_be_sent_back(
    client: openai.OpenAI, tiny_folder: Path
) -> None:
    """The stream helper and `model_dump` add members such as `parsed` and `tool_calls: null`."""
    asked: Any = {"model": tiny_folder.name, "extra_body": {"choices": ["A force."]}}
    with client.chat.completions.stream(messages=MESSAGES, **asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    whole = client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message
    for message in (streamed, streamed.model_dump(), whole.model_dump()):
        messages = [*MESSAGES, message, {"role": "user", "content": "Go on."}]
        assert client.chat.completions.create(messages=messages, **asked).choices


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": None},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"logit_bias": {}, "store": False, "metadata": {"run": "1"}, "user": "me"},
        {"service_tier": "auto", "safety_identifier": "x", "modalities": ["text"]},
        {"min_tokens": 0, "top_k": -1, "top_logprobs": 0, "ignore_eos": False},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"messages": [{"role": "user", "content": "Hi", "name": "bob"}]},
        {"messages": [{"role": "assistant", "content": None, "refusal": None}, *MESSAGES]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": None}, *MESSAGES]},
    ],
)
def test_neutral_parameters_are_accepted(
    server: RunningServer, tiny_folder: Path, extra: dict[str, Any]
) -> None:
    body = {"model": tiny_folder.name, "messages": MESSAGES, "max_tokens": 2} | extra
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "function", "name": "c", "content": "42"}], "messages[0].role"),
        (
            [*MESSAGES, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[1].content[0].type",
        ),
    ],
)
def test_an_unsupported_part_of_a_message_is_rejected_by_its_path(
    client: openai.OpenAI, tiny_folder: Path, messages: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"not supported|must be") as caught:
        client.chat.completions.create(model=tiny_folder.name, messages=messages)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_stream_adds_up_to_the_whole_answer(
    client: openai.OpenAI, tiny_folder: Path, temperature: float
) -> None:
    asked: Any = {
        "model": tiny_folder.name,
        "messages": MESSAGES,
        "max_completion_tokens": 40,
        "temperature": temperature,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n\n"],
    }
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert totals(last.usage) == totals(whole.usage)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_text_parts_and_the_developer_role_are_supported(
    client: openai.OpenAI, server: RunningServer, tiny_folder: Path
) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "gravity?"}]
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    answer = client.chat.completions.create(
        model=tiny_folder.name, messages=messages, max_tokens=6, n=1, presence_penalty=0
    )
    expected = server.ask("What is gravity?", system_prompt="Be brief.").json()
    assert answer.choices[0].message.content == expected["response"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 17, "temperature": 1}, "n"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"choices": [""]}, "choices[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop": [""]}, "stop[0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_unsupported_parameter_is_rejected_by_name(
    client: openai.OpenAI, tiny_folder: Path, extra: dict[str, Any], param: str
) -> None:
    body = {"model": tiny_folder.name, "messages": MESSAGES} | extra
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param in caught.value.message


class Sky(BaseModel):
    """The client derives a JSON schema from this model."""

    colour: Literal["blue", "grey"]
    clouds: int = Field(ge=0, le=9)


def test_an_answer_parses_as_the_requested_model(client: openai.OpenAI, tiny_folder: Path) -> None:
    answer = client.chat.completions.parse(
        model=tiny_folder.name, messages=MESSAGES, response_format=Sky
    )
    assert isinstance(answer.choices[0].message.parsed, Sky)


@pytest.mark.parametrize("is_stream", [False, True])
def test_truncated_json_is_returned_with_finish_reason_length(
    client: openai.OpenAI, server: RunningServer, tiny_folder: Path, is_stream: bool
) -> None:
    """OpenAI's way. In smol's own format it is an error that keeps the text."""
    schema = {"type": "object", "properties": {"sky": {"type": "string"}}, "required": ["sky"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}
    own = server.ask("What is gravity?", response_format=form, max_new_tokens=2)
    assert own.status_code == 400
    assert (own.json()["error_code"], own.json()["finish_reason"]) == ("incomplete_json", "length")
    asked: Any = {"model": tiny_folder.name, "messages": MESSAGES, "max_tokens": 2}
    if is_stream:
        with client.chat.completions.create(**asked, response_format=form, stream=True) as stream:
            choices = [chunk.choices[0] for chunk in stream]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        choices = client.chat.completions.create(**asked, response_format=form).choices
        text = choices[0].message.content
    assert choices[-1].finish_reason == "length"
    assert text == own.json()["response"]
    assert text.startswith("{")


def test_logprobs_are_returned_whole_and_with_the_chunks_of_their_tokens(
    client: openai.OpenAI, tiny_folder: Path
) -> None:
    asked: Any = {"logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    whole = client.chat.completions.create(model=tiny_folder.name, messages=MESSAGES, **asked)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    text = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    content = whole.choices[0].message.content or ""
    assert text.decode(errors="ignore").strip() == content.replace("\ufffd", "").strip()
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [3] * len(logprobs.content)
    with client.chat.completions.create(
        model=tiny_folder.name, messages=MESSAGES, stream=True, **asked
    ) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    parts = [chunk.logprobs.content or [] for chunk in chunks if chunk.logprobs]
    assert [entry for part in parts for entry in part] == logprobs.content
    assert len(parts) > 2
    for chunk in chunks:
        if chunk.delta.content:
            assert chunk.logprobs is not None


def test_a_stream_of_several_choices_adds_up_to_the_whole_answers(
    client: openai.OpenAI, tiny_folder: Path
) -> None:
    asked: Any = {"model": tiny_folder.name, "messages": MESSAGES, "seed": 4, "max_tokens": 12}
    asked |= {"temperature": 1, "n": 3, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert totals(last.usage) == totals(whole.usage)
    for index, expected in enumerate(whole.choices):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == expected.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [expected.finish_reason]
        entries = [e for c in own if c.logprobs for e in c.logprobs.content or []]
        assert expected.logprobs is not None
        assert entries == expected.logprobs.content


def test_n_returns_several_choices(client: openai.OpenAI, tiny_folder: Path) -> None:
    asked: Any = {"model": tiny_folder.name, "messages": MESSAGES, "temperature": 1, "seed": 4}
    one = client.chat.completions.create(**asked, max_tokens=6)
    three = client.chat.completions.create(**asked, max_tokens=6, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.choices[0].message.content == one.choices[0].message.content
    assert len({choice.message.content for choice in three.choices}) > 1
    assert three.usage is not None
    assert one.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens > one.usage.completion_tokens


def test_several_choices_are_sampled_at_openais_default_temperature(
    client: openai.OpenAI, server: RunningServer, tiny_folder: Path
) -> None:
    """Programs written for OpenAI rely on its default of 1; /chat requires a temperature."""
    asked: Any = {"model": tiny_folder.name, "messages": MESSAGES, "seed": 4, "max_tokens": 6}
    created = client.chat.completions.create
    default, explicit = created(**asked, n=3), created(**asked, n=3, temperature=1)
    assert default.choices == explicit.choices
    one, greedy = created(**asked), created(**asked, temperature=0)
    assert one.choices == greedy.choices
    assert server.ask(n=3).json()["field"] == "n"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_missing_route_is_not_a_missing_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="m", input="x")
    assert (caught.value.code, caught.value.param) == ("not_found", None)


def test_a_prompt_that_is_too_long_fails_a_stream_with_a_status(
    client: openai.OpenAI, tiny_folder: Path
) -> None:
    messages: Any = [{"role": "user", "content": "word " * 600}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=tiny_folder.name, messages=messages, stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "this model's maximum context length is 512 tokens" in caught.value.message


def test_an_engine_that_dies_ends_a_stream_with_an_error_event(tiny_folder: Path) -> None:
    """The status 200 has been sent, so the error is an event, which the client raises."""
    faulty = FaultyBackend(delay_s=0.01)
    with (
        serving(faulty.open, tiny_engine(tiny_folder)) as server,
        openai_client(server.url) as client,
    ):
        with client.chat.completions.create(
            model=tiny_folder.name, messages=MESSAGES, stream=True, max_tokens=400
        ) as stream:
            next(iter(stream))
            faulty.models[0].is_broken = True
            with pytest.raises(openai.APIError, match="the test broke the model"):
                list(stream)
        assert server.ask(**query()).status_code in (200, 500, 503)
