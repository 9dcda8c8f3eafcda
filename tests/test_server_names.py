"""The names of the served model, and the paths that clients derive from a base URL."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fakes import EchoBackend
from server_tools import RunningServer, openai_client, serving
from test_gateway import gateway
from typer.testing import CliRunner

import smolcli
from smolcli.cli.main import app
from smolcli.settings import EngineSettings

NAMES = ("gpt-4o-mini", "team/default")
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
BODY = {"messages": MESSAGES}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(lambda _: EchoBackend(), EngineSettings(), model_names=NAMES) as running:
        yield running


def test_every_served_name_is_listed_and_echoed(server: RunningServer) -> None:
    with openai_client(server.url) as client:
        assert [model.id for model in client.models.list()] == list(NAMES)
        for name in NAMES:
            assert client.models.retrieve(name).id == name
            answer = client.chat.completions.create(model=name, messages=MESSAGES)
            assert answer.model == name
            with client.chat.completions.create(
                model=name, messages=MESSAGES, stream=True
            ) as stream:
                assert {chunk.model for chunk in stream} == {name}
        with pytest.raises(openai.NotFoundError, match=f"serves '{NAMES[0]}', '{NAMES[1]}'") as no:
            client.models.retrieve("gpt-4")
        assert (no.value.code, no.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("name", ["gpt-4", EngineSettings().model])
def test_other_names_are_not_found(server: RunningServer, name: str) -> None:
    response = server.post("/v1/chat/completions", {"model": name} | BODY)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_any_model_accepts_every_name_also_in_a_gateway(server: RunningServer) -> None:
    with gateway(server.url, accepts_any_model=True) as front:
        assert [model["id"] for model in front.client.get("/models").json()["data"]] == [NAMES[0]]
        for name in ("gpt-4", "any/thing", "日本語"):
            assert (
                front.post("/v1/chat/completions", {"model": name} | BODY).json()["model"] == name
            )
            assert front.client.get(f"/v1/models/{name}").json()["id"] == name
    with gateway(server.url, model_names=("front",)) as front:
        assert [model["id"] for model in front.client.get("/models").json()["data"]] == ["front"]
        assert front.post("/v1/chat/completions", {"model": "front"} | BODY).status_code == 200
        assert front.post("/v1/chat/completions", {"model": NAMES[0]} | BODY).status_code == 404


def test_openais_routes_exist_without_their_prefix(server: RunningServer) -> None:
    assert server.client.get("/models").json() == server.client.get("/v1/models").json()
    for path in ("/models/team/default", "/models/team/default/"):
        assert server.client.get(path).json()["id"] == "team/default"
    answer = server.post("/chat/completions", {"model": NAMES[0]} | BODY).json()
    assert answer["object"] == "chat.completion"
    for rejected in (
        server.post("/chat/completions", {"model": NAMES[0]}),
        server.client.get("/models/nope"),
        server.client.get("/chat/completions"),
    ):
        assert rejected.json()["error"]["type"] == "invalid_request_error"


def test_paths_may_end_with_slashes(server: RunningServer) -> None:
    for path in (
        "/health/",
        "/ready//",
        "/metrics/",
        "/version/",
        "/openapi.json/",
        "/v1//models/",
    ):
        assert server.client.get(path).status_code == 200, path
    query = {"chat_id": "1", "user_prompt": "Hi"}
    assert server.post("/chat/", query).status_code == 200
    assert server.post("/chat/batched/", {"queries": [query]}).status_code == 200
    assert server.post("/v1/chat/completions/", {"model": NAMES[0]} | BODY).status_code == 200
    assert server.client.get("/version").json() == {"version": smolcli.__version__}


def test_a_key_is_required_on_every_form_of_a_path() -> None:
    with serving(lambda _: EchoBackend(), EngineSettings(), api_keys=("key",)) as server:
        for path in ("/health/", "/ready/", "//"):
            assert server.client.get(path).status_code == 200, path
        for path in ("/models", "/v1/models/", "/version", "/metrics/"):
            assert server.client.get(path).status_code == 401, path


def test_an_empty_name_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["serve", "--served-model-name", ""])
    assert result.exit_code == 2
    assert "--served-model-name must not be empty" in result.stderr
