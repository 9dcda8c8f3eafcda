"""/v1/responses, driven by the official OpenAI client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from server_tools import RunningServer, model_variant, openai_client, serving, tiny_engine

from smolcli.backends.local import open_local

ADD: Any = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3]}},
        "required": ["a", "b"],
    },
}


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_variant(tiny_folder, tmp_path_factory.mktemp("roomy"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serving(open_local, tiny_engine(folder)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as client:
        yield client


@pytest.fixture
def asked(folder: Path) -> dict[str, Any]:
    return {"model": folder.name, "max_output_tokens": 6}


def test_response_equals_the_answer_of_chat(
    client: openai.OpenAI, server: RunningServer, asked: dict[str, Any]
) -> None:
    response = client.responses.create(input="Why?", instructions="Be brief.", **asked)
    expected = server.ask("Why?", system_prompt="Be brief.").json()
    assert response.output_text == expected["response"]
    assert response.usage is not None
    assert response.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == expected["usage"]["completion_tokens"]
    is_cut_off = expected["finish_reason"] == "length"
    assert response.status == ("incomplete" if is_cut_off else "completed")
    assert (response.incomplete_details is not None) == is_cut_off


def test_items_are_answered_like_messages(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    first = client.responses.create(input="Hi", **asked)
    items: Any = [{"role": "user", "content": "Hi"}, *first.output]
    items.append({"role": "user", "content": [{"type": "input_text", "text": "Go on."}]})
    second = client.responses.create(input=items, **asked)
    messages: Any = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Go on."},
    ]
    completion = client.chat.completions.create(
        model=asked["model"], messages=messages, max_tokens=6
    )
    assert second.output_text == completion.choices[0].message.content


def test_stream_adds_up_to_the_response(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    whole = client.responses.create(input="Hi", **asked | {"max_output_tokens": 20})
    with client.responses.stream(input="Hi", **asked | {"max_output_tokens": 20}) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    assert whole.usage is not None
    usage = last.response.usage
    assert usage.output_tokens == whole.usage.output_tokens
    cached = usage.input_tokens_details.cached_tokens
    assert cached > 0  # of the prompt of the first request
    assert cached >= whole.usage.input_tokens_details.cached_tokens


def test_logprobs_are_those_of_chat(
    client: openai.OpenAI, server: RunningServer, asked: dict[str, Any]
) -> None:
    answer = server.ask("Hi", logprobs=True, top_logprobs=2, max_new_tokens=6).json()
    asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (whole,) = client.responses.create(input="Hi", **asked).to_dict()["output"]
    assert whole["content"][0]["logprobs"] == answer["logprobs"]
    with client.responses.stream(input="Hi", **asked) as stream:
        events = [event.to_dict() for event in stream]
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [entry for e in deltas for entry in e["logprobs"]] == answer["logprobs"]
    assert len([e for e in deltas if e["logprobs"]]) > 1
    (done,) = [e for e in events if e["type"] == "response.output_text.done"]
    assert done["logprobs"] == answer["logprobs"]


def test_function_calls_and_their_outputs_may_be_sent_back(
    client: openai.OpenAI, asked: dict[str, Any]
) -> None:
    asked |= {"max_output_tokens": 90, "parallel_tool_calls": False}
    first = client.responses.create(input="1+3?", tools=[ADD], tool_choice="required", **asked)
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["b"] == 3
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    items: Any = [{"role": "user", "content": "1+3?"}, *first.output, output]
    assert client.responses.create(input=items, tools=[ADD], **asked | {"max_output_tokens": 2})
    named: Any = {"type": "function", "name": "add"}
    with client.responses.stream(input="1+3?", tools=[ADD], tool_choice=named, **asked) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_response().output
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert streamed.type == "function_call"
    assert "".join(deltas) == streamed.arguments == call.arguments
    assert [e.type for e in events][-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


class Sky(BaseModel):
    """The client derives a JSON schema from this model."""

    colour: Literal["blue", "grey"]


def test_answer_parses_as_the_requested_model(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    asked |= {"max_output_tokens": 40}
    response = client.responses.parse(input="Sky?", text_format=Sky, **asked)
    assert isinstance(response.output_parsed, Sky)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": " "}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [ADD, ADD]}, "tools[1].name"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [ADD | {"parameters": {"type": "string"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_unsupported_parameter_is_rejected_by_path(
    client: openai.OpenAI, asked: dict[str, Any], extra: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body={"input": "Hi"} | asked | extra, cast_to=object)
    assert caught.value.param == param
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"].startswith(param.split("[")[0])


def test_too_long_prompt_is_the_input(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    """The parameter was given as "messages", which only chat completions have."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input="Hi " * 5000, **asked)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
