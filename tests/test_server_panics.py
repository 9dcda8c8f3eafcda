"""A Rust panic is a BaseException, which neither Flask nor Waitress turns into a response."""

from concurrent.futures import Future
from typing import Any

import pytest
from fakes import EchoBackend
from server_tools import query, serving

from smolcli.backends.base import Backend, OnText
from smolcli.errors import ModelError
from smolcli.server.wsgi import Server
from smolcli.settings import EngineSettings, ServerSettings
from smolcli.types import Query, Result


class Panic(BaseException):
    """What pyo3 raises when Rust code panics."""


class PanickingBackend(EchoBackend):
    """Panics when a query is submitted while `is_broken` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_broken = False

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        if self.is_broken:
            raise Panic("called `Option::unwrap()` on a `None` value")
        return super().submit(query, on_text, is_interactive=is_interactive)


def test_a_panic_while_loading_ends_the_server() -> None:
    """It used to answer 503 "loading" forever."""

    def panic(_: EngineSettings) -> Backend:
        raise Panic

    with pytest.raises(ModelError, match="cannot load the model because of an internal error"):
        Server(ServerSettings(port=0), panic).run()


def test_a_panic_in_the_warm_up_ends_the_server_and_closes_the_backend() -> None:
    backend = PanickingBackend()
    backend.is_broken = True
    with pytest.raises(ModelError):
        Server(ServerSettings(port=0), lambda _: backend).run()
    assert backend.is_closed


def test_an_unexpected_exception_while_loading_ends_the_server() -> None:
    def fail(_: EngineSettings) -> Backend:
        raise KeyError("model.embed_tokens.weight")

    with pytest.raises(ModelError, match="see the log"):
        Server(ServerSettings(port=0), fail).run()


@pytest.mark.parametrize("path", ["/chat", "/chat/batched", "/v1/chat/completions"])
def test_a_panic_while_handling_a_request_is_an_internal_error(path: str) -> None:
    """The request used to be left without a response, and its slots taken."""
    backend = PanickingBackend()
    with serving(lambda _: backend, EngineSettings(), max_queue=1) as server:
        model = server.client.get("/v1/models").json()["data"][0]["id"]
        message = {"role": "user", "content": "Hi"}
        bodies: dict[str, Any] = {
            "/chat": query(),
            "/chat/batched": {"queries": [query()]},
            "/v1/chat/completions": {"model": model, "messages": [message], "stream": True},
        }
        backend.is_broken = True
        response = server.post(path, bodies[path])
        assert response.status_code == 500
        assert "internal" in response.text
        assert "unwrap" not in response.text
        backend.is_broken = False
        assert server.post(path, bodies[path]).status_code == 200
