"""/openapi.json is valid and accurate: schemathesis finds no undocumented response."""

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from fakes import EchoBackend
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.schemas import OpenApiSchema
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that answers every valid query, whatever a model would make of it."""
    batches = BatchApiSettings(tmp_path_factory.mktemp("batches"))
    with serving(
        lambda _: EchoBackend(), EngineSettings(), api_keys=("key",), batches=batches
    ) as running:
        running.client.get("/v1/batches", headers=KEY)  # starts the threads that work on batches
        yield running


@pytest.fixture(scope="module")
def document(server: RunningServer) -> OpenApiSchema:
    """The server's own document, with its address."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=KEY)
    schema.validate()
    return schema


def test_every_route_is_documented(server: RunningServer) -> None:
    document = server.client.get("/openapi.json", headers=KEY).json()
    documented = {(m.upper(), path) for path, item in document["paths"].items() for m in item}
    assert {route for route in documented if route[0] != "PARAMETERS"} == set(ROUTES)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, GenerationMode.POSITIVE) for route in ROUTES]
    + [
        (method, path, GenerationMode.NEGATIVE)
        for method, path in ROUTES
        if method == "POST" and path != "/generate_batch"  # an alias of /chat/batched
    ],
)
def test_every_response_matches_the_document(
    document: OpenApiSchema, method: str, path: str, mode: GenerationMode
) -> None:
    operation = document[path][method]

    # A GET has no body, so that there is little to vary.
    @settings(
        max_examples=8 if method == "POST" else 3,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case[Any]) -> None:
        if mode is GenerationMode.POSITIVE:
            # The Responses API has no object around a function.
            ask_a_question(case.body, is_nested=path != "/v1/responses")
        case.call_and_validate(headers=KEY, timeout=TIMEOUT_S)

    check()


ITEM = {"role": "user", "content": "Hi"}


def ask_a_question(body: Any, is_nested: bool) -> None:
    """Have the last message come from the user, and tools have the names that are referred to.

    JSON Schema can express neither.
    """
    if not isinstance(body, dict):
        return
    if body.get("messages"):
        body["messages"][-1] = {"role": "user", "content": "Hi"}
    if body.pop("continue_final_message", None):
        body.pop("add_generation_prompt", None)
    if isinstance(items := body.get("input"), str | list) and items:
        body["input"] = "Hi" if isinstance(items, str) else [*items, ITEM]
    tools: Any = body.get("tools")
    choice: Any = body.get("tool_choice")
    chosen: list[Any] = []
    match choice:  # of another shape: an empty value, which has no effect
        case {"type": "function"}:
            chosen = [choice]
        case {"type": "allowed_tools"}:
            chosen = (choice["allowed_tools"] if is_nested else choice)["tools"]
    for at, tool in enumerate(tools if isinstance(tools, list) else []):
        (tool["function"] if is_nested else tool)["name"] = f"f{at}"
    for each in chosen:
        (each["function"] if is_nested else each)["name"] = "f0"


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
