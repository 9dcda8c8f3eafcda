"""/openapi.json is valid and accurate: schemathesis finds no undocumented response."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from fakes import EchoBackend
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from server_tools import TIMEOUT_S, RunningServer, serving

from smolcli.settings import BatchApiSettings, EngineSettings

KEY = {"Authorization": "Bearer key"}
ROUTES = [
    ("POST", "/chat"),
    ("POST", "/chat/batched"),
    ("POST", "/generate_batch"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("DELETE", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server that answers every valid query, whatever a model would make of it."""
    batches = BatchApiSettings(tmp_path)
    with serving(
        lambda _: EchoBackend(), EngineSettings(), api_keys=("key",), batches=batches
    ) as running:
        yield running


def test_every_route_is_documented(server: RunningServer) -> None:
    document = server.client.get("/openapi.json", headers=KEY).json()
    documented = {(m.upper(), path) for path, item in document["paths"].items() for m in item}
    assert {route for route in documented if route[0] != "PARAMETERS"} == set(ROUTES)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, GenerationMode.POSITIVE) for route in ROUTES]
    + [(*route, GenerationMode.NEGATIVE) for route in ROUTES if route[0] == "POST"],
)
def test_every_response_matches_the_document(
    server: RunningServer, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=KEY)
    schema.validate()
    operation = schema[path][method]

    # A GET has no body, so that there is little to vary.
    @settings(
        max_examples=12 if method == "POST" else 3,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE:
            ask_a_question(case.body)
        case.call_and_validate(headers=KEY, timeout=TIMEOUT_S)

    check()


ITEM = {"role": "user", "content": "Hi"}


def ask_a_question(body: Any) -> None:
    """Have the last message come from the user, and tools have the names that are referred to.

    JSON Schema can express neither.
    """
    if isinstance(body, dict) and body.get("messages"):
        body["messages"][-1] = {"role": "user", "content": "Hi"}
    if isinstance(body, dict) and body.pop("continue_final_message", None):
        body.pop("add_generation_prompt", None)
    if isinstance(body, dict) and body.get("tools"):
        for at, tool in enumerate(body["tools"]):
            tool.get("function", tool)["name"] = f"f{at}"
        if isinstance(choice := body.get("tool_choice"), dict):
            for each in choice.get("allowed_tools", choice).get("tools", [choice]):
                each.get("function", each)["name"] = "f0"
    if isinstance(body, dict) and body.get("input"):
        body["input"] = "Hi" if isinstance(body["input"], str) else [*body["input"], ITEM]


LAX = [
    {"chat_id": 0, "messages": None},
    {"chat_id": 0, "user_prompt": None},
    {"chat_id": 0, "user_prompt": " "},
    {"chat_id": "", "user_prompt": "Hi"},
    {"chat_id": 0, "user_prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]},
    {"chat_id": 0, "system_prompt": "", "messages": [{"role": "user", "content": "Hi"}]},
    {"chat_id": 0, "user_prompt": "Hi", "choices": [""]},
    {"chat_id": 0, "user_prompt": "Hi", "choices": [" a"]},
    {"chat_id": 0, "user_prompt": "Hi", "choices": ["a\n"]},
    {"chat_id": 0, "user_prompt": "Hi", "choices": []},
    {"chat_id": 0, "user_prompt": "Hi", "stop": [""]},
    {"chat_id": 0, "user_prompt": "Hi", "top_logprobs": 1},
    {"chat_id": 0, "user_prompt": "Hi", "top_logprobs": 1, "logprobs": False},
    {"chat_id": 0, "user_prompt": "Hi", "n": 2},
    {"chat_id": 0, "user_prompt": "Hi", "n": 2, "temperature": 0},
    {"chat_id": 0, "user_prompt": "Hi", "n": 17, "temperature": 1},
    {"chat_id": 0, "user_prompt": "Hi", "seed": 2**63},
    {"chat_id": 0, "user_prompt": "Hi", "logit_bias": {"a": 1}},
    {"chat_id": 0, "user_prompt": "Hi", "logit_bias": {"1\n": 1}},
    {"chat_id": 0, "user_prompt": "Hi", "logit_bias": {"1": 101}},
    {"chat_id": 0, "user_prompt": "Hi", "bad_words": [" "]},
    {"chat_id": 0, "user_prompt": "Hi", "min_p": 2},
    {"chat_id": 0, "user_prompt": "Hi", "structured_outputs": {"regex": "a", "choice": ["a"]}},
    {"chat_id": 0, "user_prompt": "Hi", "structured_outputs": {"regex": "a"}, "choices": ["a"]},
    {"chat_id": 0, "user_prompt": "Hi", "unknown": 1},
]
STRICT = [
    {"chat_id": 0, "user_prompt": "Hi"},
    {"chat_id": "0", "user_prompt": "Hi", "messages": None, "stop": None, "n": None},
    {"chat_id": 0, "messages": [{"role": "user", "content": "Hi"}], "user_prompt": None},
    {"chat_id": 0, "user_prompt": "Hi", "stop": ["x"], "choices": ["a b"]},
    {"chat_id": 0, "user_prompt": "Hi", "stop": "x", "response_format": {"type": "text"}},
    {"chat_id": 0, "user_prompt": "Hi", "top_logprobs": 1, "logprobs": True},
    {"chat_id": 0, "user_prompt": "Hi", "n": 2, "temperature": 0.5},
    {"chat_id": 0, "user_prompt": "Hi", "max_new_tokens": 2.0},
    {"chat_id": 0, "user_prompt": "Hi", "structured_outputs": {"regex": "a", "choice": []}},
    {"chat_id": 0, "user_prompt": "Hi", "seed": -1, "logit_bias": {"1": 1.5}, "min_tokens": 9},
]


def test_the_document_allows_exactly_what_the_parser_accepts(server: RunningServer) -> None:
    document = server.client.get("/openapi.json", headers=KEY).json()
    schema = {"$ref": "#/components/schemas/QueryFields"} | document
    validator = jsonschema.Draft202012Validator(schema)
    for body in (*LAX, *STRICT):
        is_accepted = server.client.post("/chat", json=body, headers=KEY).status_code == 200
        assert validator.is_valid(body) == is_accepted == (body in STRICT), body
