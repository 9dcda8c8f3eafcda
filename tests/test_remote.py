"""The remote backend: queries to other servers, in batches, through failures of every kind."""

import errno
import json
import math
import os
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fakes import EchoBackend
from flask import Flask, Response, jsonify, request
from flask.json.provider import DefaultJSONProvider
from legacy_host import legacy_host, listening
from server_tools import TIMEOUT_S, FaultyBackend, RunningServer, eventually, serving, tiny_engine
from typer.testing import CliRunner

from smolcli.backends.base import OnText
from smolcli.backends.local import open_local
from smolcli.backends.remote.backend import (
    MAX_BATCH_CHARS,
    RemoteBackend,
    open_gateway,
    open_remote,
)
from smolcli.backends.remote.upstream import Unavailable, Upstream, UpstreamPool
from smolcli.backends.remote.wire import Dialect, MalformedAnswer, load_object, parse_record
from smolcli.cli.main import app
from smolcli.errors import BackendError, UsageError, connection_reason
from smolcli.protocol.answer_formats import JSON_OBJECT, schema_format
from smolcli.settings import DEFAULT_MODEL, EngineSettings, QueryDefaults, RemoteSettings
from smolcli.types import (
    AnswerFormat,
    ErrorCode,
    FinishReason,
    Message,
    Query,
    Result,
    Sampling,
    Usage,
)


def query(chat_id: str = "1", prompt: str = "Hi", **fields: Any) -> Query:
    seed = int(chat_id) if chat_id.isdecimal() else 0
    asked = Query(chat_id, (Message("user", prompt),), Sampling(6, seed=seed))
    return replace(asked, **fields)


@contextmanager
def remote(*urls: str, retry_s: float = 1.0, **settings: Any) -> Iterator[RemoteBackend]:
    with closing(open_remote(RemoteSettings(urls, retry_s=retry_s, **settings))) as backend:
        yield backend


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(map(Message, cycle(("user", "assistant")), texts))


def answers(
    backend: RemoteBackend, queries: list[Query], *, is_interactive: bool = False
) -> list[Result]:
    """Submit queries so that they arrive together, however slow this thread is."""
    all_submitted = threading.Event()
    backend._loop.call_soon_threadsafe(all_submitted.wait, TIMEOUT_S)
    futures = [backend.submit(query, is_interactive=is_interactive) for query in queries]
    all_submitted.set()
    return [future.result(TIMEOUT_S) for future in futures]


@pytest.fixture(scope="module")
def smol(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(open_local, tiny_engine(tiny_folder)) as running:
        yield running


class TestSmol:
    """Another `smol serve` as the server."""

    QUERIES = (
        query("0", line=7, metadata={"a": 1}),
        query("1", "Why?", sampling=Sampling(9, 0.8, 0.9, 40, 1.2, 2**62)),
        query("2", "Say it.", stop=("e", "\u2028")),
        query("3", "Say it.", messages=(Message("system", "Be brief."), Message("user", "Hi"))),
        query(
            "4", messages=(Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
        ),
        query("5", "long " * 600),
        query("6", format=AnswerFormat(choices=("yes", "no")), top_logprobs=2),
        query("7", format=schema_format({"type": "integer", "minimum": 0, "maximum": 9})),
        query("8", format=AnswerFormat(schema=JSON_OBJECT)),
        query("9", sampling=Sampling(6, 1.0, seed=3), n=3),
    )

    @pytest.mark.parametrize("how", ["batch", "alone", "stream"])
    def test_results_equal_those_of_a_local_model(
        self, smol: RunningServer, tiny_folder: Path, how: str
    ) -> None:
        with closing(open_local(tiny_engine(tiny_folder))) as local, remote(smol.url) as backend:
            expected = [local.submit(q).result(TIMEOUT_S) for q in self.QUERIES]
            shown: list[list[str]] = [[] for _ in self.QUERIES]
            futures = [
                backend.submit(
                    q, shown[i].append if how == "stream" else None, is_interactive=how != "batch"
                )
                for i, q in enumerate(self.QUERIES)
            ]
            results = [future.result(TIMEOUT_S) for future in futures]
        assert [r.record() for r in results] == [r.record() for r in expected]
        assert expected[5].error_code is ErrorCode.PROMPT_TOO_LONG
        if how == "stream":
            assert ["".join(pieces) for pieces in shown[:5]] == [r.response for r in results[:5]]

    @pytest.mark.parametrize("on_text", [None, lambda _: None])
    def test_a_default_schema_of_the_server_does_not_apply(
        self, tiny_folder: Path, on_text: OnText | None
    ) -> None:
        """Free text requested from a gateway was once constrained by its upstream's --schema."""
        digit = QueryDefaults(format=schema_format({"type": "integer", "minimum": 0, "maximum": 9}))
        engine = tiny_engine(tiny_folder)
        with serving(open_local, engine, defaults=digit) as server, remote(server.url) as backend:
            assert server.ask().json()["response"].isdecimal()
            with closing(open_local(engine)) as local:
                expected = local.submit(query()).result(TIMEOUT_S)
            assert backend.submit(query(), on_text).result(TIMEOUT_S).record() == expected.record()

    def test_queries_that_arrive_together_share_a_batch(self, smol: RunningServer) -> None:
        with remote(smol.url) as backend:
            results = answers(backend, [query(str(n)) for n in range(24)])
            assert [r.chat_id for r in results] == [str(n) for n in range(24)]
            assert backend.counters().model_calls <= 4
            assert backend.window == 3 * 8

    def test_the_identity_is_the_servers(self, smol: RunningServer, tiny_folder: Path) -> None:
        with closing(open_local(tiny_engine(tiny_folder))) as local, remote(smol.url) as backend:
            assert backend.identity() == local.identity() | {"model": tiny_folder.name}

    @pytest.mark.parametrize("wanted", [{"model": "other"}, {"dtype": "bfloat16"}])
    def test_a_server_with_another_model_is_rejected(
        self, smol: RunningServer, wanted: dict[str, Any]
    ) -> None:
        with pytest.raises(BackendError, match=r"has the (model|dtype) '.*', not '"):
            open_remote(RemoteSettings((smol.url,), **wanted))

    @pytest.mark.parametrize("options", [[], ["--model", DEFAULT_MODEL]])
    def test_the_default_model_counts_if_it_is_given(
        self, smol: RunningServer, options: list[str]
    ) -> None:
        """Naming the default model was taken for naming none."""
        done = CliRunner().invoke(app, ["ask", "Hi", "--via", smol.url, *options])
        assert done.exit_code == (1 if options else 0)
        assert ("has the model" in done.stderr) == bool(options)

    def test_a_server_that_does_not_name_its_model_cannot_be_required_to_have_one(self) -> None:
        with legacy_host() as host, pytest.raises(BackendError, match="leave out --model"):
            open_remote(RemoteSettings((host.url,), model="SmolLM2"))

    def test_cancelling_frees_the_slot(self, tiny_folder: Path) -> None:
        faulty = FaultyBackend(delay_s=0.02)
        long = Sampling(max_new_tokens=400, repetition_penalty=1.3)
        with serving(faulty.open, tiny_engine(tiny_folder)) as server:
            settings = RemoteSettings((server.url,), api="smol")
            with closing(open_remote(settings)) as backend:
                for on_text, is_interactive in (
                    (None, False),
                    (None, True),
                    (lambda _: None, False),
                ):
                    futures = [
                        backend.submit(
                            query(str(n), sampling=long), on_text, is_interactive=is_interactive
                        )
                        for n in range(3)
                    ]
                    eventually(lambda: faulty.num_queries == 3)
                    assert all(future.cancel() for future in futures)
                    eventually(lambda: faulty.num_queries == 0)
                    eventually(lambda: backend.health().num_running == 0)

    def test_the_api_key_is_sent(self, tiny_folder: Path) -> None:
        engine = tiny_engine(tiny_folder)
        with serving(open_local, engine, api_keys=("secret",)) as server:
            with remote(server.url, api_key="secret") as backend:
                assert not backend.submit(query()).result(TIMEOUT_S).is_error
            # Retrying does not help, so this fails at once; the test times out if it does not.
            with pytest.raises(BackendError, match="returned status 401: check the API key"):
                open_remote(RemoteSettings((server.url,), api_key="wrong", retry_s=1e6))

    def test_the_server_losing_its_model_is_a_backend_error(self, tiny_folder: Path) -> None:
        faulty = FaultyBackend()
        with (
            serving(faulty.open, tiny_engine(tiny_folder)) as server,
            remote(server.url, retry_s=0.2, api="smol") as backend,
        ):
            faulty.backends[0].close()
            with pytest.raises(BackendError):
                backend.submit(query()).result(TIMEOUT_S)


class TestLegacyHost:
    """The original model service: it echoes prompts and accepts three fields."""

    def test_a_batch_is_one_request_and_the_echoed_prompt_is_removed(self) -> None:
        with legacy_host() as host, remote(host.url) as backend:
            system = (Message("system", "Be kind."), Message("user", "What?"))
            queries = [query("a", "Hi", line=3), query("b", messages=system), query("b", "So")]
            results = answers(backend, queries)
            assert [r.response for r in results] == ["Indeed a.", "Indeed b.", "Indeed b."]
            assert results[0] == Result("a", "Indeed a.", None, line=3, timings=results[0].timings)
            expected = {"user_prompt": "What?", "chat_id": "b", "system_prompt": "Be kind."}
            assert host.paths == ["/generate_batch"]
            assert host.bodies[0][1]["queries"][1] == expected
            assert backend.identity()["model"] == "unknown"

    def test_an_interactive_query_is_sent_alone_and_its_text_arrives_in_one_piece(self) -> None:
        with legacy_host() as host, remote(host.url) as backend:
            pieces: list[str] = []
            backend.submit(query(), pieces.append).result(TIMEOUT_S)
            backend.submit(query(), is_interactive=True).result(TIMEOUT_S)
            assert (pieces, host.paths) == (["Indeed 1."], ["/chat", "/chat"])

    def test_a_batch_names_the_requests_that_it_serves(self) -> None:
        ids = ["a", "a", None, "b", "x" * 126]
        with legacy_host() as host, remote(host.url) as backend:
            answers(backend, [query(str(n), request_id=each) for n, each in enumerate(ids)])
            assert host.request_ids == ["a,b"]

    def test_a_missing_batch_route_is_remembered_and_queries_are_sent_one_by_one(self) -> None:
        with (
            legacy_host(has_batch=False, delay_s=0.02) as host,
            remote(host.url, max_concurrency=3) as backend,
        ):
            for _ in range(2):
                results = answers(backend, [query(str(n)) for n in range(12)])
                assert [r.response for r in results] == [f"Indeed {n}." for n in range(12)]
            assert host.paths == ["/chat"] * 24
            assert backend.counters().model_calls == 25  # including the one to the missing route
            assert host.max_concurrent == 3

    @pytest.mark.parametrize(
        ("status", "value", "is_remembered"),
        [
            (405, {}, True),
            (501, {}, True),
            (500, {"detail": "no batch today"}, False),
            (200, [1], True),
            (200, {"responses": []}, True),
            (200, {"responses": [{"chat_id": "other", "response": "x"}] * 2}, False),
            (200, {"responses": [{"chat_id": "0"}, 5]}, False),
        ],
    )
    def test_queries_of_a_failed_batch_are_sent_one_by_one(
        self, status: int, value: Any, is_remembered: bool
    ) -> None:
        with legacy_host() as host, remote(host.url) as backend:
            host.faults.append((status, {}, value))
            results = answers(backend, [query("0"), query("1")])
            assert [r.response for r in results] == ["Indeed 0.", "Indeed 1."]
            assert host.paths == ["/generate_batch", "/chat", "/chat"]
            answers(backend, [query("0"), query("1")])
            assert ("/generate_batch" in host.paths[3:]) is not is_remembered

    def test_no_body_exceeds_what_a_server_accepts(self) -> None:
        """The first query of a batch was once not counted, so that the batch held one too many."""
        with legacy_host() as host, remote(host.url) as backend:
            long = "x" * (MAX_BATCH_CHARS * 3 // 5)
            answers(backend, [query(str(n), long) for n in range(3)])
            assert len(host.bodies) == 3

    def test_a_500_is_the_error_of_one_query(self) -> None:
        with legacy_host() as host, remote(host.url) as backend:
            results = answers(backend, [query("0"), query("1", "boom"), query("2")])
            assert [r.response for r in results] == ["Indeed 0.", None, "Indeed 2."]
            failed = results[1]
            assert (failed.error_code, failed.error) == (ErrorCode.INTERNAL, "CUDA out of memory")
            assert host.paths == ["/generate_batch"] + ["/chat"] * 3

    def test_a_conversation_is_never_sent(self) -> None:
        with legacy_host() as host, remote(host.url) as backend:
            results = answers(backend, [query("0", messages=turns("x", "y", "z")), query("1")])
            assert (results[0].error_code, results[0].field) == ("invalid_value", "messages")
            assert results[1].response == "Indeed 1."
            assert len(host.bodies[0][1]["queries"]) == 1


class TestFailures:
    """Servers that fail, and how queries are retried."""

    def test_503_is_retried_after_the_time_it_names(self) -> None:
        with legacy_host() as host, remote(host.url, retry_s=60) as backend:
            host.faults += [(503, {"Retry-After": "1"}, {}), (502, {}, {}), (504, {}, {})]
            assert answers(backend, [query("0"), query("1")])[1].response == "Indeed 1."
            assert host.paths == ["/generate_batch"] * 4

    def test_a_server_is_left_alone_for_as_long_as_it_asks(self) -> None:
        upstream = Upstream("http://a", httpx2.AsyncClient())
        upstream.mark_healthy()
        before = time.monotonic()
        upstream.back_off(Unavailable("busy", retry_after_s=30))
        upstream.back_off(Unavailable("busy", retry_after_s=1))
        assert upstream.retry_at >= before + 30
        assert upstream.is_healthy
        assert not upstream.is_ready

    def test_503_beyond_the_retry_time_is_a_backend_error(self) -> None:
        with legacy_host() as host, remote(host.url, retry_s=2) as backend:
            host.faults += [(503, {}, {})] * 50
            with pytest.raises(BackendError, match="returned status 503"):
                backend.submit(query()).result(TIMEOUT_S)
            assert 1 < len(host.bodies) < 12

    def test_a_busy_server_is_waited_for_beyond_the_retry_time(self) -> None:
        """It answers and says when to come back, so it is not unreachable."""
        with legacy_host() as host, remote(host.url, retry_s=0.1) as backend:
            host.faults += [(503, {"Retry-After": "1"}, {})] * 2
            assert answers(backend, [query("0")])[0].response == "Indeed 0."

    def test_a_timeout_is_not_retried(self) -> None:
        with legacy_host(delay_s=0.5) as host, remote(host.url, timeout_s=0.1) as backend:
            with pytest.raises(BackendError, match="did not respond in time"):
                backend.submit(query()).result(TIMEOUT_S)
            eventually(lambda: host.bodies != [])
            assert len(host.bodies) == 1

    def test_a_server_that_goes_down_and_comes_back(self) -> None:
        with legacy_host() as host:
            port = int(host.url.rpartition(":")[2])
            backend = open_gateway(RemoteSettings((host.url,), retry_s=1))
            eventually(lambda: backend.health().is_ready)
        with closing(backend):
            waiting = backend.submit(query())
            eventually(lambda: not backend.health().is_ready)
            assert backend.health().is_alive
            with pytest.raises(BackendError, match="cannot be reached"):
                waiting.result(TIMEOUT_S)
            with pytest.raises(BackendError, match="cannot be reached"):
                backend._pool.choose(math.inf).send(None)  # at once, without waiting
            with legacy_host(port):
                eventually(lambda: backend.health().is_ready)
                assert backend.submit(query()).result(TIMEOUT_S).response == "Indeed 1."

    def test_a_short_outage_loses_nothing(self) -> None:
        with legacy_host() as host:
            port = int(host.url.rpartition(":")[2])
            backend = open_remote(RemoteSettings((host.url,), retry_s=20))
        with closing(backend):
            futures = [backend.submit(query(str(n))) for n in range(5)]
            time.sleep(0.3)
            with legacy_host(port):
                assert [f.result(TIMEOUT_S).response for f in futures] == [
                    f"Indeed {n}." for n in range(5)
                ]

    def test_without_retries_a_server_is_still_given_one_chance(self) -> None:
        """A retry time of 0 was over before the first health check, so nothing ever connected."""
        with legacy_host() as host, remote(host.url, retry_s=0) as backend:
            assert answers(backend, [query("0")])[0].response == "Indeed 0."
            host.faults.append((503, {}, {}))
            with pytest.raises(BackendError, match="returned status 503"):
                backend.submit(query()).result(TIMEOUT_S)
            assert len(host.bodies) == 2
        with pytest.raises(BackendError, match="cannot be reached"):
            open_remote(RemoteSettings(("http://127.0.0.1:9",), retry_s=0))

    def test_no_server_at_the_url(self) -> None:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(BackendError, match=r"cannot be reached: Connection refused$"):
                open_remote(RemoteSettings((f"http://{host}:9",), retry_s=0))
        for url in ("localhost:8000", "ftp://x", "", "http://", "http://x/v1?y=1", "http://x#y"):
            with pytest.raises(UsageError, match=r"URL|query"):
                open_remote(RemoteSettings((url,)))

    def test_the_reason_is_that_of_an_address_with_a_route(self) -> None:
        """Without IPv6, that of ::1 hid the one of 127.0.0.1."""
        codes = (errno.EADDRNOTAVAIL, errno.ECONNREFUSED)
        failed = httpx2.ConnectError("failed")
        failed.__cause__ = ExceptionGroup("", [OSError(code, os.strerror(code)) for code in codes])
        assert connection_reason(failed) == "Connection refused"

    def test_tls_errors_say_what_to_do(self) -> None:
        """They quoted OpenSSL, with the place in its source."""
        with serving(lambda _: EchoBackend(), EngineSettings()) as server:
            url = server.url.replace("http:", "https:")
            with pytest.raises(BackendError, match="it does not speak TLS; use http:"):
                open_remote(RemoteSettings((url,), retry_s=0))
        refused = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]")
        refused.verify_code, refused.verify_message = 18, "self-signed certificate"
        failed = httpx2.ConnectError("failed")
        failed.__cause__ = refused
        reason = "its certificate is not accepted: self-signed certificate"
        assert connection_reason(failed).startswith(f"{reason}; set SSL_CERT_FILE to a file")
        refused.verify_code = 62  # the host name does not match
        assert connection_reason(failed) == reason

    @pytest.mark.parametrize(
        ("variable", "value", "reason"),
        [
            ("ALL_PROXY", "socks5://127.0.0.1:9", "a SOCKS proxy needs the package socksio"),
            ("HTTP_PROXY", "ftp://127.0.0.1:9", "Unknown scheme for proxy URL"),
            ("HTTP_PROXY", "http://[::1", "Invalid port"),
            ("SSL_CERT_FILE", "/nonexistent", "No such file or directory"),
        ],
    )
    def test_what_a_client_cannot_use_in_the_environment_is_named(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
    ) -> None:
        """These ended in a traceback, or were reported as a failure to write to stdout."""
        monkeypatch.setenv(variable, value)
        with pytest.raises(UsageError, match=f"{reason}.*; check {variable}"):
            open_remote(RemoteSettings(("http://127.0.0.1:9",)))

    def test_an_unreachable_proxy_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        with pytest.raises(BackendError, match=r"cannot be reached: .*; check http_proxy"):
            open_remote(RemoteSettings(("http://127.0.0.1:10",), retry_s=0))

    def test_errors_do_not_contain_credentials(self) -> None:
        with pytest.raises(BackendError, match=r"^http://127.0.0.1:9/a@b cannot be reached"):
            open_remote(RemoteSettings(("http://me:secret@127.0.0.1:9/a@b",), retry_s=0))
        with pytest.raises(UsageError, match=r"^the API key for the servers contains control"):
            open_remote(RemoteSettings(("http://127.0.0.1:9",), api_key="a\nb"))
        unanswered = Upstream("http://me:secret@host", httpx2.AsyncClient())
        assert unanswered.reason == "http://host has not answered yet"

    def test_an_api_key_may_be_any_text(self, tiny_folder: Path) -> None:
        with serving(open_local, tiny_engine(tiny_folder), api_keys=("schlüssel",)) as server:
            url = server.url
            with remote(url, api_key="schlüssel\n") as backend:
                assert not answers(backend, [query()])[0].is_error

    @pytest.mark.parametrize(
        ("status", "headers", "message"),
        [
            (200, {"Content-Type": "text/html"}, "does not list its models at /v1/models; is it"),
            (
                308,
                {"Location": "https://x/v1/models"},
                "redirects to https://x/v1/models",
            ),
        ],
    )
    def test_another_kind_of_server_is_named(
        self, status: int, headers: dict[str, str], message: str
    ) -> None:
        app = Flask("other")
        app.get("/v1/models")(lambda: Response("<h1>Welcome</h1>", status, headers))
        with listening(app) as url, pytest.raises(BackendError, match=f"^{url} {message}"):
            open_remote(RemoteSettings((url,)))

    def test_load_is_balanced_between_healthy_servers(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A server that never answered was not mentioned."""
        with legacy_host(delay_s=0.3) as one, legacy_host(delay_s=0.3) as other:
            urls = (one.url, other.url, "http://127.0.0.1:9")
            with remote(*urls) as backend:
                eventually(lambda: "upstream unhealthy: http://127.0.0.1:9 " in caplog.text)
                eventually(lambda: sum(u.is_healthy for u in backend._pool.upstreams) == 2)
                answers(backend, [query(str(n)) for n in range(10)])
                sizes = [len(host.bodies[0][1]["queries"]) for host in (one, other)]
                assert sizes == [5, 5]
                answers(backend, [query("a")] * 4, is_interactive=True)
                assert [host.paths[1:] for host in (one, other)] == [["/chat"] * 2] * 2

    def test_queries_of_a_failing_server_are_retried_on_another(self) -> None:
        with legacy_host() as one, legacy_host() as other, remote(one.url, other.url) as backend:
            eventually(lambda: all(u.is_healthy for u in backend._pool.upstreams))
            for host in (one, other):
                host.faults.append((502, {}, {}))
            results = answers(backend, [query(str(n)) for n in range(40)])
            assert [r.response for r in results] == [f"Indeed {n}." for n in range(40)]

    def test_closing_fails_open_queries(self) -> None:
        with legacy_host(delay_s=0.5) as host:
            backend = open_remote(RemoteSettings((host.url,)))
            future = backend.submit(query())
            backend.close()
            for late in (future, backend.submit(query())):
                with pytest.raises(BackendError, match="closed"):
                    late.result(TIMEOUT_S)
            assert not backend.health().is_alive


class TestOpenAI:
    """A server with an OpenAI-compatible API, such as vLLM."""

    @staticmethod
    def app(bodies: list[Any]) -> Flask:
        app = Flask(__name__)

        @app.get("/v1/models")
        def models() -> Any:
            return jsonify(object="list", data=[{"id": "first"}, {"id": "second"}])

        @app.post("/v1/chat/completions")
        def completions() -> Any:
            body = request.get_json()
            bodies.append(body)
            prompt = body["messages"][-1]["content"]
            if prompt == "long":
                message = "This model's maximum context length is 512 tokens."
                return jsonify(object="error", message=message, code=400), 400
            if body.get("stream"):
                pieces = ["", " It", " is\u2028so."]
                chunks: list[Any] = [{"choices": [{"delta": {"content": p}}]} for p in pieces]
                chunks.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
                chunks.append(
                    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
                )
                lines = [": hello\n\n", *(f"data: {app.json.dumps(c)}\n\n" for c in chunks)]
                if prompt != "torn":
                    lines.append("data: [DONE]\n\n")
                return Response(iter(lines), mimetype="text/event-stream")
            said = (
                '{"so": true}' if body.get("response_format") and prompt != "torn" else " It is so."
            )
            token = {"token": said, "logprob": -0.5, "bytes": None, "top_logprobs": []}
            choice = {
                "message": {"content": said},
                "logprobs": {"content": [token]} if body.get("logprobs") else None,
                "finish_reason": "stop",
            }
            choices = [choice | {"index": n} for n in reversed(range(body.get("n", 1)))]
            usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            return jsonify(choices=choices, usage=usage)

        assert isinstance(app.json, DefaultJSONProvider)
        app.json.ensure_ascii = False
        return app

    def test_requests_use_the_openai_api(self) -> None:
        bodies: list[Any] = []
        with (
            listening(self.app(bodies)) as url,
            remote(f"{url}/v1", f"{url}/v1/chat/completions/", model="second") as backend,
        ):
            sampled = Sampling(5, 0.5, 0.9, 40, 1.1, 11, min_p=0.2, logit_bias=((3, -1.0),))
            results = answers(
                backend, [query("7"), query("8", "So", sampling=sampled, stop=("x",))]
            )
            assert [r.response for r in results] == ["It is so."] * 2
            assert results[0].usage == Usage(3, 4)
            plain, rich = sorted(bodies, key=len)
            common = {"model": "second", "temperature": 0.0, "top_p": 1.0}
            hi = [{"role": "user", "content": "Hi"}]
            assert plain == common | {"messages": hi, "max_tokens": 6, "seed": 7}
            assert (rich["top_k"], rich["repetition_penalty"], rich["stop"]) == (40, 1.1, ["x"])
            assert (rich["min_p"], rich["logit_bias"]) == (0.2, {"3": -1.0})
            assert not {"min_tokens", "ignore_eos", "bad_words"} & rich.keys()
            assert backend.identity()["model"] == "second"

    def test_pieces_are_passed_on_and_make_up_the_answer(self) -> None:
        pieces: list[str] = []
        with listening(self.app([])) as url, remote(url) as backend:
            result = backend.submit(query(), pieces.append).result(TIMEOUT_S)
            assert pieces == [" It", " is\u2028so."]
            assert (result.response, result.finish_reason) == ("It is\u2028so.", "length")
            assert result.usage == Usage(3, 2)

    def test_an_interrupted_stream_is_not_retried(self) -> None:
        bodies: list[Any] = []
        with listening(self.app(bodies)) as url, remote(url) as backend:
            with pytest.raises(BackendError, match=f"was interrupted: {url}: the stream "):
                backend.submit(query(prompt="torn"), lambda _: None).result(TIMEOUT_S)
            assert len(bodies) == 1

    def test_formats_log_probabilities_and_n_are_requested(self) -> None:
        bodies: list[Any] = []
        asked = query(
            format=schema_format({"type": "array"}),
            top_logprobs=2,
            n=3,
            sampling=Sampling(5, 1.0, seed=7),
        )
        with listening(self.app(bodies)) as url, remote(url) as backend:
            result, torn, choice = answers(
                backend,
                [
                    asked,
                    query(prompt="torn", format=AnswerFormat(schema=JSON_OBJECT)),
                    query(format=AnswerFormat(choices=("yes", "no"))),
                ],
            )
        sent = next(body for body in bodies if "n" in body)
        schema = {"name": "answer", "schema": {"type": "array"}}
        assert sent["response_format"] == {"type": "json_schema", "json_schema": schema}
        assert (sent["n"], sent["logprobs"], sent["top_logprobs"]) == (3, True, 2)
        assert [each.response for each in (result, *result.alternatives)] == ['{"so": true}'] * 3
        assert result.logprobs is not None
        assert result.logprobs[0]["logprob"] == -0.5
        assert torn.error_code is ErrorCode.INCOMPLETE_JSON
        assert torn.response
        assert (choice.error_code, choice.field) == (ErrorCode.INVALID_VALUE, "choices")

    @pytest.mark.parametrize(
        ("message", "finish_reason", "expected"),
        [
            ({"content": "part"}, "content_filter", ("part", FinishReason.CONTENT_FILTER)),
            ({"content": "hi"}, None, ("hi", None)),
            ({"content": "hi"}, "eos_token", ("hi", None)),
            ({"content": "hi"}, ["stop"], ("hi", None)),
            ({"content": None}, "content_filter", "no text (finish_reason 'content_filter')"),
            ({"content": None, "tool_calls": []}, "tool_calls", "(finish_reason 'tool_calls')"),
            ({}, "stop", "no text (finish_reason 'stop')"),
            ({"content": [{"type": "text", "text": "hi"}]}, "stop", "malformed answer"),
            ({"content": 5}, "stop", "malformed answer"),
            ({"content": "lone \ud800"}, "stop", "malformed answer"),
            (None, "stop", "malformed answer"),
        ],
    )
    def test_an_odd_answer_is_passed_on_or_the_error_of_its_query(
        self, message: Any, finish_reason: Any, expected: Any
    ) -> None:
        """Such answers once became "stop", or ended the run and every resume of it."""
        choice = {"message": message, "finish_reason": finish_reason}
        odd = {"choices": [choice | {"logprobs": None}], "usage": None}
        with listening(odd_server(json.dumps(odd))) as url, remote(url) as backend:
            result, sound = answers(backend, [query(prompt="odd"), query()])
        assert (sound.response, sound.finish_reason) == ("fine", FinishReason.STOP)
        if isinstance(expected, tuple):
            assert (result.response, result.finish_reason, result.usage) == (*expected, None)
        else:
            assert result.error_code is ErrorCode.INTERNAL
            assert expected in str(result.error)

    @pytest.mark.parametrize(
        "body",
        [
            "<html>",
            "[]",
            '{"choices": [], "usage": NaN}',
            '{"choices": []}',
            '{"choices": [{"message": {"content": "x"}, "score": 1e999}]}',
            '{"choices": [{"message": {"content": "x"}}], "choices": []}',
        ],
    )
    def test_a_malformed_body_is_the_error_of_its_query(self, body: str) -> None:
        with listening(odd_server(body)) as url, remote(url) as backend:
            result, sound = answers(backend, [query(prompt="odd"), query()])
        assert (result.error_code, sound.response) == (ErrorCode.INTERNAL, "fine")

    @pytest.mark.parametrize(
        ("chunk", "expected"),
        [
            ('{"choices": [{"delta": {"content": ["x"]}}]}', "malformed answer"),
            ('{"choices": [{"delta": {"content": "x"}, "p": NaN}]}', "malformed answer"),
            ('{"choices": [{"finish_reason": "tool_calls"}]}', "(finish_reason 'tool_calls')"),
            ('{"choices": []}', "returned no text"),
            ('{"choices": [{"delta": {"refusal": "No."}, "finish_reason": "stop"}]}', "no text"),
            ('{"error": {"message": "out of memory"}}', "out of memory"),
        ],
    )
    def test_an_odd_stream_is_the_error_of_its_query(self, chunk: str, expected: str) -> None:
        body = f"data: {chunk}\n\ndata: [DONE]\n\n"
        with listening(odd_server(body)) as url, remote(url) as backend:
            result = backend.submit(query(prompt="odd"), lambda _: None).result(TIMEOUT_S)
        assert result.error_code is ErrorCode.INTERNAL
        assert expected in str(result.error)

    @pytest.mark.parametrize(
        "body",
        [
            'data: {"choices": [{"delta": {"content": "hi"}}], "error": null}\n\ndata: [DONE]\n\n',
            '\ufeffdata: {"choices": [{"delta": {"content": "hi"}}]}\n\ndata: [DONE]\n\n',
            '{"choices": [{"message": {"content": "hi"}}]}',
        ],
        ids=["null error", "byte order mark", "no stream"],
    )
    def test_an_unusual_stream_is_an_answer(self, body: str) -> None:
        """The first line used to be lost if it followed a byte order mark."""
        pieces: list[str] = []
        with listening(odd_server(body)) as url, remote(url) as backend:
            result = backend.submit(query(prompt="odd"), pieces.append).result(TIMEOUT_S)
        assert (result.response, pieces, result.finish_reason) == ("hi", ["hi"], None)

    def test_an_error_with_status_200_is_reported_in_its_own_words(self) -> None:
        body = '{"error": {"message": "the GPU is gone", "code": 500}}'
        with listening(odd_server(body)) as url, remote(url) as backend:
            result = backend.submit(query(prompt="odd")).result(TIMEOUT_S)
        assert (result.error, result.error_code) == ("the GPU is gone", ErrorCode.INTERNAL)

    def test_a_server_that_has_got_another_model_is_identified_again(self) -> None:
        with listening(changing_server()) as url, closing(gateway(url)) as backend:
            eventually(lambda: backend.identity().get("model") == "old")
            assert backend.submit(query(), is_interactive=True).result(TIMEOUT_S).response == "old"
            httpx2.post(f"{url}/change", timeout=TIMEOUT_S)
            assert backend.submit(query(), is_interactive=True).result(TIMEOUT_S).response == "new"
            assert backend.identity()["model"] == "new"

    @pytest.mark.parametrize("status", [408, 425, 529])
    def test_a_transient_status_is_retried(self, status: int) -> None:
        with legacy_host() as host, remote(host.url) as backend:
            host.faults.append((status, {}, {"detail": "busy"}))
            result = backend.submit(query(), is_interactive=True).result(TIMEOUT_S)
        assert result.response == "Indeed 1."

    def test_error_codes_are_translated(self) -> None:
        with listening(self.app([])) as url, remote(url) as backend:
            result = backend.submit(query(prompt="long")).result(TIMEOUT_S)
            assert result.error_code is ErrorCode.PROMPT_TOO_LONG


def test_a_server_that_was_unhealthy_is_another_source_of_answers() -> None:
    """A gateway once went on giving cached answers of a server that had been replaced."""
    upstream = Upstream("http://a", httpx2.AsyncClient())
    pool = UpstreamPool([upstream], RemoteSettings((upstream.url,)), is_pinned=False)
    assert pool.answer_source() is None
    upstream.identity = {"model": "m", "revision": "abc"}
    upstream.mark_healthy()
    first = pool.answer_source()
    assert first is not None
    assert first.is_verified
    assert pool.answer_source() == first
    upstream.mark_unhealthy("it is gone")
    assert pool.answer_source() is None
    upstream.mark_healthy()
    assert pool.answer_source() not in (None, first)


@pytest.mark.parametrize(
    ("identities", "is_verified"),
    [
        ([{"revision": "abc"}, {"revision": "abc"}], True),
        ([{"revision": "abc"}, {"api": "openai", "revision": None}], False),
        ([{"model": "m", "revision": None}], False),
        ([{"api": "chat", "model": "unknown", "revision": None}], None),
        ([{"revision": "abc"}, {"api": "chat"}], None),
    ],
)
def test_only_a_smol_server_identifies_its_model(
    identities: list[dict[str, Any]], is_verified: bool | None
) -> None:
    upstreams = [Upstream(f"http://{n}", httpx2.AsyncClient()) for n in range(len(identities))]
    for upstream, identity in zip(upstreams, identities, strict=True):
        upstream.identity = identity
        upstream.mark_healthy()
    source = UpstreamPool(upstreams, RemoteSettings(()), is_pinned=False).answer_source()
    assert (source.is_verified if source else None) is is_verified


def odd_server(body: str) -> Flask:
    """An OpenAI-compatible server that answers the question "odd" with a body of the test's."""
    app = Flask(__name__)

    @app.get("/v1/models")
    def models() -> Any:
        return jsonify(data=[{"id": "m"}])

    @app.post("/v1/chat/completions")
    def completions() -> Any:
        if request.get_json()["messages"][-1]["content"] == "odd":
            kind = "application/json" if body.startswith(("{", "[", "<")) else "text/event-stream"
            return Response(body, mimetype=kind)
        message = {"role": "assistant", "content": "fine"}
        return jsonify(choices=[{"message": message, "finish_reason": "stop"}])

    return app


def changing_server() -> Flask:
    """An OpenAI-compatible server whose model changes on POST /change."""
    app, models = Flask(__name__), ["old"]

    @app.get("/v1/models")
    def listed() -> Any:
        return jsonify(data=[{"id": models[-1]}])

    @app.post("/change")
    def change() -> Any:
        models.append("new")
        return {}

    @app.post("/v1/chat/completions")
    def completions() -> Any:
        if request.get_json()["model"] != models[-1]:
            return jsonify(error={"message": "no such model", "param": "model", "code": 404}), 404
        return jsonify(choices=[{"message": {"content": models[-1]}}])

    return app


def gateway(url: str) -> RemoteBackend:
    return open_gateway(RemoteSettings((url,), retry_s=TIMEOUT_S))


@pytest.mark.parametrize(
    "record",
    [{"response": None, "error": "boom"}, {"error": "boom"}, {"detail": "boom", "response": None}],
)
def test_an_error_beside_an_empty_response_is_the_error(record: dict[str, Any]) -> None:
    result = parse_record({"chat_id": "1"} | record, query(), Dialect.SMOL)
    assert (result.error, result.error_code) == ("boom", ErrorCode.INTERNAL)


def test_a_count_that_no_table_could_hold_is_unknown() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 10**40}
    record = {"chat_id": "1", "response": "hi", "usage": usage}
    assert parse_record(record, query(), Dialect.SMOL).usage is None


def test_one_malformed_response_spoils_neither_its_batch_nor_later_ones() -> None:
    poison = '{"responses": [{"chat_id": "0", "response": "a"}, {"chat_id": "1", "response": "b",'
    with legacy_host() as host, remote(host.url) as backend:
        host.faults.append((200, {}, poison + ' "score": NaN}]}'))
        results = answers(backend, [query("0"), query("1")])
        assert [r.response for r in results] == ["a", "Indeed 1."]
        assert host.paths == ["/generate_batch", "/chat"]
        answers(backend, [query("2"), query("3")])
        assert host.paths[2:] == ["/generate_batch"]


def test_an_answer_nested_too_deep_is_malformed() -> None:
    with pytest.raises(MalformedAnswer, match="not JSON"):
        load_object(b'{"a":' * 100_000)


def test_queries_may_be_submitted_from_many_threads(smol: RunningServer) -> None:
    with remote(smol.url) as backend:
        futures: list[Future[Result]] = []

        def work(number: int) -> None:
            for n in range(10):
                futures.append(backend.submit(query(f"{number}{n}"), is_interactive=n % 2 == 0))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(not future.result(TIMEOUT_S).is_error for future in futures)
