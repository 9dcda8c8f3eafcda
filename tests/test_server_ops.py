"""API keys, CORS, probes, metrics, logs and security headers."""

import gc
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes import EchoBackend
from prometheus_client.parser import text_string_to_metric_families
from server_tools import (
    FaultyBackend,
    RunningServer,
    captured_log,
    eventually,
    query,
    serving,
    tiny_engine,
)

from smolcli.backends.base import Backend, Health
from smolcli.backends.dedup import deduplicated
from smolcli.backends.local import open_local
from smolcli.backends.remote.backend import open_gateway
from smolcli.server.access_log import JsonFormatter, PlainFormatter
from smolcli.settings import EngineSettings, RemoteSettings
from smolcli.types import Query, Result

SECRET = "the password is swordfish"


@pytest.fixture
def server(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(open_local, tiny_engine(tiny_folder)) as running:
        yield running


def test_every_route_but_probes_and_page_requires_the_key(tiny_folder: Path) -> None:
    keys = ("first-key", "zweiter-schlüssel")
    with serving(FaultyBackend().open, tiny_engine(tiny_folder), api_keys=keys) as server:
        for path in ("/health", "/ready", "/", "/page/page.js"):
            assert server.client.get(path).status_code in (200, 304)
        for path in ("/metrics", "/openapi.json", "/v1/models", "/nope", "/chat"):
            refused = server.client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        for sent in ("Bearer wrong", "Bearer first-key2", "Basic first-key", "first-key", "Bearer"):
            assert server.post("/chat", query(), Authorization=sent).status_code == 401
        assert server.post("/chat", query(), Authorization="Bearer first-key").status_code == 200
        raw = {b"Authorization": f"bearer {keys[1]}".encode()}
        assert server.client.post("/chat", json=query(), headers=raw).status_code == 200
        assert server.client.get("/v1/models").json()["error"]["code"] == "unauthorized"


def test_only_listed_origins_are_allowed(tiny_folder: Path) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    engine = tiny_engine(tiny_folder)
    with serving(FaultyBackend().open, engine, api_keys=("k",)) as server:
        assert server.client.options("/chat", headers=ask).status_code == 401
    origins = ("https://a.example",)
    with serving(FaultyBackend().open, engine, api_keys=("k",), cors_origins=origins) as server:
        allowed = server.client.options("/chat", headers=ask)
        assert allowed.status_code == 204
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert allowed.headers["access-control-allow-headers"] == "authorization,content-type"
        other = server.client.options("/chat", headers=ask | {"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        answer = server.post("/chat", {}, Authorization="Bearer k", Origin="https://a.example")
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "Origin" in answer.headers["vary"]
    with serving(FaultyBackend().open, engine, cors_origins=("*",)) as server:
        answer = server.post("/chat", query(), Origin="https://c.example")
        assert answer.headers["access-control-allow-origin"] == "*"


def test_a_valid_request_id_is_kept_and_others_are_replaced(server: RunningServer) -> None:
    assert server.post("/chat", {}, **{"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for invalid in ("", "a b", "x" * 129, "ü"):
        headers = {b"X-Request-Id": invalid.encode()}
        made = server.client.get("/health", headers=headers).headers["x-request-id"]
        assert len(made) == 32


def test_metrics_count_outcomes_tokens_and_latencies(server: RunningServer) -> None:
    answers = server.post("/chat/batched", {"queries": [query(), {"chat_id": "2"}, query()]})
    server.post("/chat", {})
    server.client.get("/nope")
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = metrics(server)
    usages = [r["usage"] for r in answers.json()["responses"] if "usage" in r]
    assert samples["smol_prompt_tokens_total",] == sum(u["prompt_tokens"] for u in usages)
    assert samples["smol_generation_tokens_total",] == sum(u["completion_tokens"] for u in usages)
    successes = [v for name, v in samples.items() if name[0] == "smol_request_success_total"]
    assert sum(successes) == 2
    assert samples["smol_request_errors_total", "missing_field"] == 2
    assert samples["smol_request_errors_total", "not_found"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert samples[f"smol_{name}_seconds_count",] == 2
    assert samples["smol_inter_token_latency_seconds_count",] == 2
    drafted = samples["smol_spec_decode_draft_tokens_total",]
    assert 0 <= samples["smol_spec_decode_accepted_tokens_total",] <= drafted
    assert samples["smol_requests_running",] == samples["smol_requests_waiting",] == 0
    [listed] = server.client.get("/v1/models").json()["data"]
    [info] = [labels for name, *labels in samples if name == "smol_model_info"]
    assert listed["smol"]["dtype"] in info


def metrics(server: RunningServer) -> dict[tuple[str, ...], float]:
    """The value of each metric by its name and labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(server.client.get("/metrics").text)
        for sample in family.samples
    }


def test_deduplicated_answers_are_counted_apart(tiny_folder: Path) -> None:
    """They used to count as generated tokens, with latencies of nearly 0."""
    with serving(deduplicated(open_local), tiny_engine(tiny_folder)) as server:
        with captured_log("/chat") as log:
            usages = [server.ask().json()["usage"] for _ in range(4)]
            assert log.wait(4).fields["deduplicated"] == 1
        samples = metrics(server)
    assert samples["smol_generation_tokens_total",] == usages[0]["completion_tokens"]
    assert samples["smol_prompt_tokens_total",] == usages[0]["prompt_tokens"]
    assert samples["smol_request_deduplicated_total",] == 3
    assert samples["smol_e2e_request_latency_seconds_count",] == 1
    assert samples["smol_inter_token_latency_seconds_count",] == 1
    successes = [v for name, v in samples.items() if name[0] == "smol_request_success_total"]
    assert sum(successes) == 4


def test_tokens_of_cancelled_streams_are_counted(tiny_folder: Path) -> None:
    faulty = FaultyBackend(delay_s=0.01)
    body: Any = {"model": tiny_folder.name, "messages": [{"role": "user", "content": "Hi"}]}
    body |= {"stream": True, "max_tokens": 400, "repetition_penalty": 1.3}
    with serving(faulty.open, tiny_engine(tiny_folder)) as server:
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            num_pieces = sum("content" in next(lines) for _ in range(20))
        eventually(lambda: ("smol_request_errors_total", "cancelled") in metrics(server))
        samples = metrics(server)
    assert samples["smol_generation_tokens_total",] >= num_pieces - 1  # the first one is empty
    assert samples["smol_prompt_tokens_total",] > 0
    assert samples["smol_request_errors_total", "cancelled"] == 1


class RecordingBackend(EchoBackend):
    """Records the ids of the requests that its queries belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.request_ids: list[str | None] = []

    def answer(self, query: Query) -> Result:
        self.request_ids.append(query.request_id)
        return super().answer(query)


def test_a_gateway_passes_the_request_id_on() -> None:
    backend = RecordingBackend()
    with (
        serving(lambda _: backend, EngineSettings()) as upstream,
        serving(
            lambda _: open_gateway(RemoteSettings((upstream.url,))),
            EngineSettings(),
            is_gateway=True,
        ) as gateway,
    ):
        backend.request_ids.clear()  # of the warm-up
        stream = {"model": EngineSettings().model, "stream": True}
        stream |= {"messages": [{"role": "user", "content": "Hi"}]}
        for request_id, path, body in (
            ("one", "/chat", query("1")),
            ("many", "/chat/batched", {"queries": [query("2"), query("3")]}),
            ("stream", "/v1/chat/completions", stream),
        ):
            response = gateway.post(path, body, **{"X-Request-Id": request_id})
            assert response.status_code == 200
            assert response.headers["X-Request-Id"] == request_id
        gateway.ask("4")
    *known, generated = backend.request_ids
    assert known == ["one", "many", "many", "stream"]
    assert generated is not None
    assert len(generated) == 32


def test_metrics_report_running_and_waiting_queries(tiny_folder: Path) -> None:
    faulty = FaultyBackend(delay_s=0.02)
    with serving(faulty.open, tiny_engine(tiny_folder)) as server, ThreadPoolExecutor(1) as pool:
        batch = {"queries": [query(max_new_tokens=400, repetition_penalty=1.3)] * 10}
        response = pool.submit(server.post, "/chat/batched", batch)
        eventually(lambda: faulty.backends[0].health().num_running == 8)
        with faulty.models[0].held():
            eventually(lambda: faulty.num_queries == 10)
            samples = metrics(server)
        assert samples["smol_requests_running",] == 8
        assert samples["smol_requests_waiting",] == 2
        faulty.models[0].delay_s = 0.0
        assert response.result().status_code == 200


def test_each_request_logs_one_line_without_prompts(server: RunningServer) -> None:
    with captured_log("/chat") as log:
        server.post("/chat", query(SECRET), **{"X-Request-Id": "id-1"})
        answered = log.wait(1)
        server.post("/chat", {SECRET: 1})
        rejected = log.wait(2)
    plain = PlainFormatter("%(message)s").format(answered)
    assert plain.startswith("POST /chat status=200 request_id=id-1 queries=1 failed=0 prompt_tok")
    logged_fields = json.loads(JsonFormatter().format(answered))
    expected = {"time", "level", "message", "status", "request_id", "queries", "failed"}
    expected |= {"prompt_tokens", "completion_tokens", "queue_s", "first_token_s", "total_s"}
    assert set(logged_fields) == expected
    assert logged_fields["completion_tokens"] >= 1
    assert (
        0 <= logged_fields["queue_s"] <= logged_fields["first_token_s"] <= logged_fields["total_s"]
    )
    assert "error_code=unknown_field" in PlainFormatter("%(message)s").format(rejected)
    assert SECRET not in str([vars(record) for record in log.records])


def test_log_prompts_logs_prompts(tiny_folder: Path) -> None:
    with serving(open_local, tiny_engine(tiny_folder), log_prompts=True) as server:
        with captured_log("/chat") as log:
            server.ask(SECRET)
            record = log.wait(1)
        assert f'prompts=["{SECRET}"]' in PlainFormatter("%(message)s").format(record)


def test_a_log_line_stays_one_line(server: RunningServer) -> None:
    with captured_log("/a%0Astatus%3D200") as log:
        server.client.get("/a%0Astatus=200")
        assert "\n" not in PlainFormatter("%(message)s").format(log.wait(1))
    failure = logging.makeLogRecord({"msg": "x", "exc_info": (ValueError, ValueError("y"), None)})
    assert json.loads(JsonFormatter().format(failure))["traceback"] == "ValueError: y"


def test_requests_are_rejected_while_the_model_loads(tiny_folder: Path) -> None:
    """The server accepts connections at once and answers 503 until it is ready."""
    engine = tiny_engine(tiny_folder)
    loading = BlockedLoading()
    with serving(loading.open, engine, waits=False) as server:
        assert server.client.get("/health").json() == {"status": "ok"}
        ready = server.client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        refused = server.ask()
        assert (refused.status_code, refused.json()["error_code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "2"
        assert server.client.get("/v1/models").status_code == 200
        loading.may_continue.set()
        eventually(lambda: server.client.get("/ready").status_code == 200)
        assert server.client.get("/ready").json() == {"status": "ready"}
        assert server.ask().status_code == 200


class BlockedLoading:
    """Loads the model once `may_continue` is set."""

    def __init__(self) -> None:
        self.may_continue = threading.Event()

    def open(self, settings: EngineSettings) -> Backend:
        assert self.may_continue.wait(30)
        return open_local(settings)


class StuckBackend(EchoBackend):
    """Has running queries and makes no progress while `is_stuck` is set."""

    is_stuck = False

    def health(self) -> Health:
        return Health(True, self.is_stuck, num_running=1, num_waiting=3)


def test_a_stuck_engine_fails_the_probes_until_it_recovers() -> None:
    backend = StuckBackend()
    with serving(lambda _: backend, EngineSettings()) as server:
        assert server.client.get("/health").status_code == 200
        backend.is_stuck = True
        health, ready = server.client.get("/health"), server.client.get("/ready")
        assert (health.status_code, health.json()) == (503, {"status": "stuck"})
        assert (ready.status_code, ready.json()) == (503, {"status": "stuck"})
        backend.is_stuck = False
        assert server.client.get("/health").json() == {"status": "ok"}


def test_garbage_collection_skips_what_was_loaded() -> None:
    """It held the interpreter lock for a tenth of a second."""
    gc.unfreeze()
    with serving(lambda _: EchoBackend(), EngineSettings()):
        eventually(lambda: gc.get_freeze_count() > 0)


def test_the_page_has_security_headers(server: RunningServer) -> None:
    page = server.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'se")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"
    script = server.client.get("/page/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    for missing in ("/page/nope.js", "/page/nope", "/page/", "/page/.css"):
        assert server.client.get(missing).status_code == 404
