"""Servers for tests: real sockets, and a tiny model that can be slowed down or broken."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from smolcli.backends.base import OpenBackend
from smolcli.backends.local import LocalBackend
from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Batch, Hidden
from smolcli.server.wsgi import Server
from smolcli.settings import EngineSettings, ServerSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.weights.loader import load_model

if TYPE_CHECKING:
    from openai import OpenAI

TIMEOUT_S = 120.0  # a busy CI machine may stall for a while


def tiny_engine(folder: Path) -> EngineSettings:
    """Engine settings for the tiny model in float32."""
    return EngineSettings(model=str(folder), dtype="float32", max_batch_size=8)


def model_variant(folder: Path, target: Path, template: str | None = None) -> Path:
    """The model of `folder` in `target`, with room for long prompts and maybe another template."""
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    files = {"config.json": json.dumps(config | {"max_position_embeddings": 4096})}
    if template is not None:
        files["chat_template.jinja"] = template
    for name, text in files.items():
        (target / name).unlink(missing_ok=True)
        (target / name).write_text(text, "utf-8")
    return target


class FaultyModel:
    """The tiny model with a delay in every step, which can be held or made to fail."""

    def __init__(self, folder: Path, delay_s: float) -> None:
        self._model = load_model(folder, "float32")
        self._may_step = threading.Event()
        self._may_step.set()
        self.delay_s = delay_s
        self.is_broken = False
        self.poison_id: int | None = None  # every step with this token in its input fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish no step for the duration of the context, so that no query is answered."""
        self._may_step.clear()
        try:
            yield
        finally:
            self._may_step.set()

    def forward(self, batch: Batch) -> Hidden:
        time.sleep(self.delay_s)
        self._may_step.wait()
        if self.is_broken or self.poison_id in batch.token_ids.tolist():
            raise RuntimeError("the test broke the model")
        return self._model.forward(batch)


@dataclass
class FaultyBackend:
    """Opens a backend around a `FaultyModel` and exposes both to the test."""

    delay_s: float = 0.0
    models: list[FaultyModel] = field(default_factory=list)
    backends: list[LocalBackend] = field(default_factory=list)

    def open(self, settings: EngineSettings) -> LocalBackend:
        folder = Path(settings.model)
        self.models.append(FaultyModel(folder, self.delay_s))
        engine = Engine(self.models[0], settings.max_batch_size, 64 << 20)
        self.backends.append(
            LocalBackend(lambda: ChatTokenizer.load(folder), lambda: engine, {}, 2)
        )
        return self.backends[0]

    @property
    def num_queries(self) -> int:
        """Number of queries in the engine, running or waiting."""
        health = self.backends[0].health()
        return health.num_running + health.num_waiting


@dataclass
class RunningServer:
    """A server running in this process, and a client connected to it."""

    server: Server
    client: httpx2.Client
    thread: threading.Thread

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def post(self, path: str, value: Any, **headers: str) -> httpx2.Response:
        return self.client.post(path, json=value, headers=headers)

    def ask(self, prompt: str = "Hi", **fields: Any) -> httpx2.Response:
        return self.post("/chat", query(prompt, **fields))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=TIMEOUT_S)


def query(prompt: str = "Hi", **fields: Any) -> dict[str, Any]:
    """A query whose answer has at most 6 tokens."""
    return {"chat_id": "1", "user_prompt": prompt, "max_new_tokens": 6} | fields


def http(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    """The bytes of an HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chat_request(**fields: Any) -> bytes:
    return http("/chat", json.dumps(query(**fields)).encode(), "Content-Type: application/json")


@contextmanager
def serving(
    open_backend: OpenBackend,
    engine: EngineSettings,
    waits: bool = True,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Run a server on a free port in a thread; wait until it is ready unless `waits` is false."""
    server = Server(ServerSettings(port=0, engine=engine, **settings), open_backend)
    thread = threading.Thread(target=server.run)
    thread.start()
    # Without TLS, as loading the system's certificates takes longer than starting the server.
    with httpx2.Client(base_url=server.url, timeout=TIMEOUT_S, verify=False) as client:
        try:
            if waits:
                eventually(lambda: client.get("/ready").status_code == 200)
            yield RunningServer(server, client, thread)
        finally:
            server.stop()
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


@contextmanager
def openai_client(url: str, key: str = "-") -> Iterator["OpenAI"]:
    """The official client of a server. It does not retry, and loads no certificates."""
    import openai  # late: takes long

    with (
        httpx2.Client(verify=False, timeout=TIMEOUT_S) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http) as client,
    ):
        yield client


def eventually(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


@dataclass
class Process:
    """A `smol serve` process."""

    popen: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self.log.read_text("utf-8")

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=TIMEOUT_S, verify=False)

    def ask(self, value: dict[str, Any]) -> httpx2.Response:
        return httpx2.post(f"{self.url}/chat", json=value, timeout=TIMEOUT_S, verify=False)

    def wait(self) -> tuple[int, str]:
        """Wait for the process; returns its exit code and its stderr."""
        return self.popen.wait(TIMEOUT_S), self.stderr


@contextmanager
def serve_process(*args: str) -> Iterator[Process]:
    """Start `smol serve` on a free port and wait until it is ready.

    Its stderr is a file: once a pipe that nobody reads was full, the server would wait forever.
    """
    command = [sys.executable, "-m", "smolcli", "serve", "--port", "0", "--threads", "1", *args]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with (
        tempfile.TemporaryDirectory() as folder,
        (Path(folder) / "stderr").open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment) as popen,
    ):
        process = Process(popen, "", Path(log.name))

        def is_ready() -> bool:
            has_exited = popen.poll() is not None
            match = re.search(r'ready at (http://[\w.:]+)[\s"]', process.stderr)
            process.url = match[1] if match else ""
            assert match or not has_exited, f"the server exited: {process.stderr}"
            return bool(match)

        try:
            eventually(is_ready)
            yield process
        finally:
            popen.kill()


class CapturedLog(logging.Handler):
    """Collects the access log records of requests to one path."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().endswith(f" {self._path}"):
            self.records.append(record)

    def wait(self, number: int) -> Any:
        """Wait for the `number`th record, which may follow its response, and return it."""
        eventually(lambda: len(self.records) >= number)
        assert len(self.records) == number
        return self.records[-1]


@contextmanager
def captured_log(path: str) -> Iterator[CapturedLog]:
    """Capture the access log of requests to a path."""
    logger, log = logging.getLogger("smolcli.server"), CapturedLog(path)
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    try:
        yield log
    finally:
        logger.removeHandler(log)
