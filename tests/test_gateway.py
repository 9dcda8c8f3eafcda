"""Two services, a gateway in front of a model service, and `smol run --via`."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from legacy_host import legacy_host
from server_tools import (
    TIMEOUT_S,
    RunningServer,
    eventually,
    query,
    serve_process,
    serving,
    tiny_engine,
)
from typer.testing import CliRunner, Result

from smolcli.backends.dedup import deduplicated
from smolcli.backends.local import open_local
from smolcli.backends.remote.backend import open_gateway
from smolcli.cli.main import app
from smolcli.settings import EngineSettings, RemoteSettings

ROOT = Path(__file__).parent.parent


LONG_LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 500}


@contextmanager
def gateway(
    *urls: str, retry_s: float = 0.5, waits: bool = True, **settings: Any
) -> Iterator[RunningServer]:
    remote = RemoteSettings(urls, retry_s=retry_s)
    open_backend = lambda _: open_gateway(remote)  # noqa: E731
    with serving(
        open_backend, EngineSettings(), waits=waits, is_gateway=True, **settings
    ) as running:
        yield running


@pytest.fixture(scope="module")
def service(tiny_folder: Path) -> Iterator[RunningServer]:
    with serving(open_local, tiny_engine(tiny_folder)) as running:
        yield running


def write_queries(path: Path, num: int, **fields: Any) -> Path:
    """Queries of many kinds, and some invalid lines."""
    lines = []
    for n in range(num):
        value: dict[str, Any] = {"chat_id": f"q{n}", "user_prompt": f"Question {n}?"} | fields
        if n % 5 == 1:
            value |= {"temperature": 0.9, "top_k": 20, "stop": ["e"], "metadata": {"n": n}}
        if n % 7 == 4:
            value |= {"choices": ["yes", "no"], "n": 2, "temperature": 0.9}
        if n % 11 == 2:
            value = {"chat_id": f"q{n}", "user_prompt": " "}
        lines.append(json.dumps(value) if n % 17 != 3 else "{nonsense")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def smol_run(input: Path, output: Path, *args: str) -> Result:
    fixed = ("--max-new-tokens", "12", "--seed", "5", "--quiet")
    return CliRunner().invoke(app, ["run", str(input), "-o", str(output), *fixed, *args])


def local_args(folder: Path) -> tuple[str, ...]:
    return ("--model", str(folder), "--dtype", "float32", "--max-batch-size", "8")


def test_local_remote_and_gateway_results_are_the_same_bytes(
    service: RunningServer, tiny_folder: Path, tmp_path: Path
) -> None:
    input = write_queries(tmp_path / "in.jsonl", 60)
    here, there, through = (tmp_path / name for name in ("here", "there", "through"))
    assert smol_run(input, here, *local_args(tiny_folder)).exit_code == 3
    assert smol_run(input, there, "--via", service.url).exit_code == 3
    with gateway(service.url) as front:
        assert smol_run(input, through, "--via", front.url).exit_code == 3
    assert there.read_bytes() == here.read_bytes()
    assert through.read_bytes() == here.read_bytes()
    manifests = [
        json.loads((tmp_path / f"{p.name}.manifest.json").read_text()) for p in (there, through)
    ]
    assert manifests[0]["backend"] == manifests[1]["backend"]
    assert manifests[0]["backend"]["model"] == tiny_folder.name
    assert manifests[0]["backend"]["dtype"] == "float32"


def test_a_run_is_not_resumed_with_another_model(
    service: RunningServer, tiny_folder: Path, tmp_path: Path
) -> None:
    input, output = write_queries(tmp_path / "in.jsonl", 10), tmp_path / "out"
    assert smol_run(input, output, "--via", service.url, "--limit", "5").exit_code == 3
    with legacy_host() as host:
        refused = smol_run(input, output, "--via", host.url)
        assert refused.exit_code == 2
        assert f'model was "{tiny_folder.name}", is "unknown"' in refused.stderr
        assert smol_run(input, tmp_path / "old", "--via", host.url).exit_code == 3


def test_a_server_that_is_gone_ends_the_run_and_leaves_no_errors_in_its_output(
    tmp_path: Path,
) -> None:
    input, output = write_queries(tmp_path / "in.jsonl", 20), tmp_path / "out"
    with legacy_host() as host:
        host.faults += [(503, {}, {})] * 50
        ended = smol_run(input, output, "--via", host.url, "--retry-for", "0.3")
        assert ended.exit_code == 1
        assert "returned status 503" in ended.stderr
        assert output.read_bytes() == b""
        host.faults.clear()
        assert smol_run(input, output, "--via", host.url).exit_code == 3
    gone = smol_run(input, tmp_path / "new", "--via", host.url, "--retry-for", "0.1")
    assert (gone.exit_code, "cannot be reached" in gone.stderr) == (1, True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_killing_the_model_service_loses_and_duplicates_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    input = write_queries(tmp_path / "in.jsonl", 300)
    here, out = tmp_path / "here", tmp_path / "out"
    smol_run(input, here, *local_args(tiny_folder))
    with serve_process(*local_args(tiny_folder)) as first:
        killer = threading.Thread(target=kill_when, args=(first.popen, out, 60))
        killer.start()
        ended = smol_run(input, out, "--via", first.url, "--retry-for", "0.5")
        killer.join()
    assert ended.exit_code == 1
    assert "cannot be reached" in ended.stderr
    half = out.read_bytes()
    assert 60 <= half.count(b"\n") < 300
    assert here.read_bytes().startswith(half)
    with serving(open_local, tiny_engine(tiny_folder)) as second, gateway(second.url) as front:
        assert smol_run(input, out, "--via", front.url).exit_code == 3
    assert out.read_bytes() == here.read_bytes()


def test_an_openai_batch_resumes_with_answers_of_unknown_usage(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [json.dumps({"custom_id": str(n)} | line) for n in range(4)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    arguments = (tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--via")
    with legacy_host() as host:
        assert smol_run(*arguments, host.url, "--limit", "2").exit_code == 0
        assert smol_run(*arguments, host.url).exit_code == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["response"]["body"]["usage"] for each in written] == [None] * 4


def kill_when(process: subprocess.Popen[str], output: Path, num_lines: int) -> None:
    eventually(lambda: output.exists() and output.read_bytes().count(b"\n") >= num_lines)
    process.send_signal(signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_killing_one_of_two_services_does_not_affect_the_run(
    service: RunningServer, tiny_folder: Path, tmp_path: Path
) -> None:
    input = write_queries(tmp_path / "in.jsonl", 300)
    here, out = tmp_path / "here", tmp_path / "out"
    smol_run(input, here, *local_args(tiny_folder))
    with serve_process(*local_args(tiny_folder)) as other:
        killer = threading.Thread(target=kill_when, args=(other.popen, out, 30))
        killer.start()
        assert smol_run(input, out, "--via", service.url, "--via", other.url).exit_code == 3
        killer.join()
    assert out.read_bytes() == here.read_bytes()


class TestSurface:
    """A gateway has every route of a server."""

    def test_routes_answer_as_those_of_the_upstream(self, service: RunningServer) -> None:
        with gateway(service.url, api_keys=("front",)) as front:
            front.client.headers["Authorization"] = "Bearer front"
            assert front.ask().json() == service.ask().json()
            assert front.ask("").json() == service.ask("").json()
            batch = {"queries": [query(), {"chat_id": "x"}, query("What?", temperature=1, seed=3)]}
            for path in ("/chat/batched", "/generate_batch"):
                answers = front.post(path, batch).json()
                assert answers == service.post(path, batch).json()
                assert answers["partial_success"] is True
            assert (
                front.client.get("/v1/models").json()["data"][0]["smol"]
                == (service.client.get("/v1/models").json()["data"][0]["smol"])
            )
            schemas = front.client.get("/openapi.json").json()["components"]["schemas"]
            known = schemas["CompletionFields"]["properties"]["model"]["enum"]
            assert known == [service.client.get("/v1/models").json()["data"][0]["id"]]
            assert front.client.get("/").status_code == 200
            assert "smol_generation_tokens_total" in front.client.get("/metrics").text
            del front.client.headers["Authorization"]
            assert front.ask().status_code == 401

    def test_streams_equal_those_of_the_upstream(self, service: RunningServer) -> None:
        model = service.client.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        with gateway(service.url) as front:
            for extra in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
                answers = [
                    server.post("/v1/chat/completions", body | extra).text.splitlines()
                    for server in (service, front)
                ]
                assert pieces(answers[0]) == pieces(answers[1])
            lines = front.post(
                "/chat/batched", {"queries": [query(), query()]}, Accept="application/x-ndjson"
            ).text.splitlines()
            assert sorted(json.loads(line)["index"] for line in lines) == [0, 1]

    def test_json_that_is_cut_off(self, service: RunningServer) -> None:
        """Either format reports it as the upstream itself does, whole or streamed."""
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": LONG_LIST}}
        own = {"chat_id": "1", "user_prompt": "Hi", "response_format": form, "max_new_tokens": 5}
        with gateway(service.url) as front:
            for path in ("/chat", "/chat/batched"):
                body = own if path == "/chat" else {"queries": [own, own | {"chat_id": "2"}]}
                direct, through = (each.post(path, body) for each in (service, front))
                assert direct.json() == through.json()
                assert '"response":"[' in through.text.replace(": ", ":")
            name = front.client.get("/v1/models").json()["data"][0]["id"]
            body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
            body |= {"response_format": form, "max_tokens": 5}
            direct, through = (
                each.post("/v1/chat/completions", body).json() for each in (service, front)
            )
            assert through["choices"] == direct["choices"]
            assert computed(through["usage"]) == computed(direct["usage"])
            assert through["choices"][0]["finish_reason"] == "length"

    def test_an_invalid_query_is_never_sent_upstream(self) -> None:
        with legacy_host() as host, gateway(host.url) as front:
            batch = {"queries": [query(), {"chat_id": "2"}, {"user_prompt": "x"}, 5, query()]}
            answers = front.post("/chat/batched", batch).json()["responses"]
            assert [("response" in answer) for answer in answers] == [
                True,
                False,
                False,
                False,
                True,
            ]
            assert host.paths == ["/generate_batch"]
            assert len(host.bodies[0][1]["queries"]) == 2
            assert front.ask(" ").status_code == 400
            assert len(host.bodies) == 1
            whole = front.post(
                "/v1/chat/completions",
                {"model": "unknown", "messages": [{"role": "user", "content": "Hi"}]},
            )
            assert whole.json()["choices"][0]["message"]["content"].startswith("Indeed chatcmpl")
            assert whole.json()["choices"][0]["finish_reason"] is None
            assert whole.json()["usage"] is None


def pieces(lines: list[str]) -> list[Any]:
    """The parts of a completion that do not change from one request to the next."""
    values = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    return [(value["choices"], computed(value.get("usage"))) for value in values]


def computed(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """Usage without what the prefix cache held, which smol's own API does not tell a gateway."""
    return usage and {k: v for k, v in usage.items() if k != "prompt_tokens_details"}


def test_an_upstream_that_goes_down_and_comes_back(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with legacy_host() as host:
        port = int(host.url.rpartition(":")[2])
    with gateway(host.url, waits=False) as front:
        ready = front.client.get("/ready")
        eventually(lambda: front.client.get("/ready").json() == {"status": "no_upstream"})
        ready = front.client.get("/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "2")
        assert front.client.get("/health").status_code == 200
        refused = front.ask()
        assert (refused.status_code, refused.json()["error_code"]) == (503, "backend_error")
        answers = front.post("/chat/batched", {"queries": [query(), {"chat_id": "x"}]}).json()
        codes = [answer["error_code"] for answer in answers["responses"]]
        assert codes == ["backend_error", "missing_field"]
        assert "ready at" not in caplog.text
        with legacy_host(port):
            eventually(lambda: front.client.get("/ready").status_code == 200)
            eventually(lambda: "ready at" in caplog.text)
            assert front.ask().json()["response"] == "Indeed 1."


def test_a_gateway_does_not_share_answers_of_an_unidentified_server() -> None:
    """It once gave the answers of a server that had been replaced, to everybody, forever."""
    remote = RemoteSettings(("",), retry_s=0.5)
    with legacy_host() as host:
        open_backend = deduplicated(lambda _: open_gateway(replace(remote, urls=(host.url,))))
        with serving(open_backend, EngineSettings(), is_gateway=True) as front:
            answers = [front.ask(chat_id=name).json() for name in ("a", "b")]
    assert [answer["response"] for answer in answers] == ["Indeed a.", "Indeed b."]
    assert [answer["finish_reason"] for answer in answers] == [None, None]


def test_the_request_id_is_passed_on_to_the_upstream() -> None:
    with legacy_host() as host, gateway(host.url) as front:
        front.post("/chat", query(), **{"X-Request-Id": "mine"})
        front.post("/chat/batched", {"queries": [query(), query()]}, **{"X-Request-Id": "batch"})
        made_up = front.ask().headers["X-Request-Id"]
        assert host.request_ids == ["mine", "batch", made_up]


def test_a_disconnecting_client_frees_the_slot_at_the_upstream(tiny_folder: Path) -> None:
    with legacy_host(delay_s=0.3) as host, gateway(host.url) as front:
        with pytest.raises(httpx2.ReadTimeout):
            front.client.post("/chat", json=query(), timeout=httpx2.Timeout(TIMEOUT_S, read=0.05))
        eventually(lambda: "running 0.0" in front.client.get("/metrics").text)


def test_ask_via_a_server(service: RunningServer) -> None:
    asked = ["ask", "What?", "--max-new-tokens", "6", "--seed", "1", "--json"]
    result = CliRunner().invoke(app, [*asked, "--via", service.url])
    assert json.loads(result.stdout)["usage"]["completion_tokens"] <= 6
    once = CliRunner().invoke(app, [*asked, "--via", service.url, "--retry-for", "0"])
    assert once.exit_code == 0, once.stderr
    gone = CliRunner().invoke(app, [*asked, "--via", "http://127.0.0.1:9", "--retry-for", "0"])
    assert gone.exit_code == 1
    assert gone.stderr.startswith("smol: http://127.0.0.1:9 cannot be reached")


def test_ask_via_a_server_sends_the_first_of_the_keys_in_the_environment(tiny_folder: Path) -> None:
    """SMOL_API_KEY="one two" was two keys to the server and a single one to its clients."""
    keys = ("first", "second")
    with serving(open_local, tiny_engine(tiny_folder), api_keys=keys) as server:
        asked = ["ask", "What?", "--max-new-tokens", "2", "--via", server.url, "--retry-for", "0"]
        for value, exit_code in (("first second", 0), ("second", 0), ("third first", 1)):
            done = CliRunner().invoke(app, asked, env={"SMOL_API_KEY": value})
            assert done.exit_code == exit_code, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("run", "x.jsonl", "--via", "localhost:1"),
        ("run", "x.jsonl", "--via", "http://a", "--via", "http://a"),
        ("run", "x.jsonl", "--via", "http://a", "--backend", "ray"),
        ("ask", "x", "--via", "http://a", "--upstream-api", "soap"),
        ("ask", "x", "--via", "http://a:99999"),
    ],
)
def test_contradictory_options_are_usage_errors(args: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"chat_id":"1","user_prompt":"x"}\n')
    args = tuple(str(tmp_path / a) if a == "x.jsonl" else a for a in args)
    assert CliRunner().invoke(app, list(args)).exit_code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_gateway_uses_little_memory_and_no_torch() -> None:
    with legacy_host() as host, serve_process("--upstream", host.url) as front:
        eventually(lambda: front.get("/ready").status_code == 200)
        assert front.ask(query()).status_code == 200
        status = Path(f"/proc/{front.popen.pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        assert int(resident.split()[1]) < 100_000
        assert "torch" not in Path(f"/proc/{front.popen.pid}/maps").read_text()
