"""`smol serve` as a process: start-up, shutdown and options."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from server_tools import TIMEOUT_S, eventually, query, serve_process
from typer.testing import CliRunner

from smolcli.cli.commands.serve import ServeOptions
from smolcli.cli.main import app
from smolcli.server.wsgi import _is_loopback
from smolcli.settings import EngineSettings, QueryDefaults

LONG = query(max_new_tokens=400, repetition_penalty=1.3)
signals = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


@signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_finishes_running_requests_and_rejects_new_ones(
    deep_folder: Path, number: signal.Signals
) -> None:
    """Every request is answered or rejected as documented, and the exit code is 0."""
    args = ("--model", str(deep_folder), "--drain-timeout", "300", "--no-dedupe")
    with serve_process(*args) as process, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(process.ask, LONG | {"chat_id": str(n)}) for n in range(8)]
        eventually(lambda: "running 8.0" in process.get("/metrics").text)
        process.signal(number)
        eventually(lambda: process.get("/ready").json() == {"status": "draining"})
        late = process.ask(query())
        assert (late.status_code, late.headers["retry-after"]) == (503, "2")
        assert [response.result().status_code for response in asked] == [200] * 8
        code, stderr = process.wait()
    assert code == 0
    assert "shutting down: 8 requests in flight" in stderr
    assert "Traceback" not in stderr


@signals
def test_requests_that_exceed_the_drain_timeout_can_be_retried(deep_folder: Path) -> None:
    """They were reported as if the engine had failed, which is an operator's task."""
    args = ("--model", str(deep_folder), "--drain-timeout", "0")
    with serve_process(*args) as process, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(process.ask, LONG)
        eventually(lambda: "running 1.0" in process.get("/metrics").text)
        process.signal(signal.SIGTERM)
        response = asked.result()
        assert (response.status_code, response.json()["error_code"]) == (503, "overloaded")
        assert response.headers["retry-after"] == "2"
        assert process.wait()[0] == 0


@signals
def test_a_second_ctrl_c_exits_at_once(deep_folder: Path) -> None:
    with (
        serve_process("--model", str(deep_folder)) as process,
        socket.create_connection(("127.0.0.1", int(process.url.rpartition(":")[2]))) as client,
    ):
        body = json.dumps({"queries": [LONG] * 900}).encode()
        head = f"POST /chat/batched HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        eventually(lambda: "running 0" not in process.get("/metrics").text)
        process.signal(signal.SIGINT)
        eventually(lambda: process.get("/ready").json() == {"status": "draining"})
        process.signal(signal.SIGINT)
        assert process.wait()[0] == -signal.SIGINT


def test_schema_constrains_every_query_without_a_format_of_its_own(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "digit.json"
    path.write_text('{"type": "integer", "minimum": 0, "maximum": 9}', "utf-8")
    text: dict[str, Any] = {"response_format": {"type": "text"}}
    asked = {"model": tiny_folder.name, "messages": [{"role": "user", "content": "Hi"}]}
    with serve_process("--model", str(tiny_folder), "--schema", str(path)) as process:

        def post(route: str, body: dict[str, Any]) -> Any:
            return httpx2.post(f"{process.url}{route}", json=body, timeout=TIMEOUT_S).json()

        chats = [post("/chat", query() | extra) for extra in ({}, text)]
        batch = post("/chat/batched", {"queries": [query(), query(**text), query(choices=["b"])]})
        others = [post("/v1/chat/completions", asked | extra) for extra in ({}, text)]
    constrained, free = [answer["response"] for answer in chats]
    assert (constrained.isdecimal(), free.isdecimal()) == (True, False)
    assert [each["response"] for each in batch["responses"]] == [constrained, free, "b"]
    contents = [answer["choices"][0]["message"]["content"] for answer in others]
    assert [content.isdecimal() for content in contents] == [True, False]


def smol(*args: str) -> tuple[int, str]:
    """Run `smol` to completion; returns its exit code and its stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "smolcli", *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    return done.returncode, done.stderr


def test_a_port_in_use_is_reported(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, stderr = smol("serve", "--model", str(tiny_folder), "--port", str(port))
    assert code == 1
    assert stderr.splitlines() == [
        f"smol: cannot listen on 127.0.0.1:{port}: Address already in use; "
        "choose another --host or --port"
    ]


def test_an_unknown_host_is_reported() -> None:
    result = CliRunner().invoke(app, ["serve", "--no-batches", "--host", "999.1.1.1"])
    assert result.exit_code == 1
    assert "cannot listen on 999.1.1.1:8000: unknown host; choose another" in result.stderr


@pytest.mark.parametrize("content", [None, "[]", '{"type": "nonsense"}', "nonsense"])
def test_an_invalid_schema_is_rejected_before_loading_the_model(
    tiny_folder: Path, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content, "utf-8")
    args = ["serve", "--model", str(tiny_folder), "--port", "0", "--schema", str(path)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert [line[: len(f"smol: --schema {path}")] for line in result.stderr.splitlines()] == [
        f"smol: --schema {path}"
    ]


def test_a_missing_model_is_reported(tmp_path: Path) -> None:
    code, stderr = smol("serve", "--model", f"{tmp_path}/nothing.gguf", "--port", "0")
    assert code == 1
    assert stderr.splitlines()[-1] == f"smol: no such file: {tmp_path}/nothing.gguf"
    assert "Traceback" not in stderr


@pytest.mark.parametrize("content", [None, b"", b"# only this\n\n", b"\xff\xfe"])
def test_an_unusable_key_file_is_reported(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    result = CliRunner().invoke(app, ["serve", "--api-key-file", str(path)])
    assert result.exit_code == 1
    assert str(path) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_options_become_settings(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\nb\n\n  c  \n  # another\n", "utf-8")
    options = ServeOptions(api_key=["a"], api_key_file=path, max_body_mb=2)
    settings = options.settings(QueryDefaults(), EngineSettings())
    assert settings.api_keys == ("a", "b", "c")
    assert settings.max_body_bytes == 2 << 20


def test_max_queue_limits_batches_by_itself() -> None:
    settings = ServeOptions(max_queue=4).settings(QueryDefaults(), EngineSettings())
    assert (settings.max_queue, settings.max_batch_queries) == (4, 4)


@pytest.mark.parametrize("args", [
    ("--max-queue", "5", "--max-batch-queries", "6"), ("--api-key", ""), ("--port", "-1"),
    ("--cors-origin", "example.org"), ("--cors-origin", "https://example.org/"),
])  # fmt: skip
def test_invalid_options_are_rejected(args: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["serve", *args]).exit_code == 2


@pytest.mark.parametrize(
    ("host", "expected"),
    [("::1", True), ("[::1]", True), ("localhost", True), ("::", False), ("example.org", False)],
)
def test_only_loopback_addresses_need_no_key(host: str, expected: bool) -> None:
    """A bracketed address, as in a URL, was reported as open to anyone."""
    assert _is_loopback(host) is expected


def test_listening_on_all_interfaces_without_a_key_logs_a_warning(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_process("--model", str(tiny_folder), "--host", "0.0.0.0") as process:
        assert re.search(r"http://0.0.0.0:\d+ is open to anyone", process.stderr)
    monkeypatch.setenv("SMOL_API_KEY", "first second")
    with serve_process(
        "--model", str(tiny_folder), "--host", "0.0.0.0", "--log-format", "json"
    ) as process:
        assert process.ask(query()).status_code == 401
        process.popen.terminate()
        lines = [json.loads(line) for line in process.wait()[1].splitlines()]
        assert [line["level"] for line in lines] == ["info"] * len(lines)
