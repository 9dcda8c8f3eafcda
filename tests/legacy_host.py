"""A stand-in for the model service that smol replaces, on a real socket."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, jsonify, request
from waitress import wasyncore
from waitress.server import create_server


@dataclass
class LegacyHost:
    """Echoes the prompt and adds an answer; accepts three fields and no generation settings.

    Args:
        has_batch: whether it has /generate_batch.
        delay_s: how long an answer takes, in seconds.
        bodies: path and body of each request so far.
        request_ids: X-Request-Id of each request so far.
        faults: status, headers and body to respond with instead, for the next requests; a body that
            is a string is sent as it is.
    """

    has_batch: bool = True
    delay_s: float = 0.0
    bodies: list[tuple[str, Any]] = field(default_factory=list)
    request_ids: list[str | None] = field(default_factory=list)
    faults: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    max_concurrent: int = 0
    url: str = ""
    _num_running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.bodies]

    def app(self) -> Flask:
        app = Flask(__name__)

        @app.post("/chat")
        def chat() -> Any:
            return self._serve(lambda body: self._answer(body))

        if self.has_batch:

            @app.post("/generate_batch")
            def batch() -> Any:
                return self._serve(
                    lambda body: {"responses": [self._answer(item) for item in body["queries"]]}
                )

        @app.errorhandler(404)
        @app.errorhandler(405)
        def missing(exc: Any) -> Any:
            return jsonify(detail=exc.name), exc.code

        return app

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        if "boom" in body["user_prompt"]:
            raise ValueError("CUDA out of memory")
        prompt = "\n".join(filter(None, [body.get("system_prompt"), body["user_prompt"]]))
        return {"chat_id": body["chat_id"], "response": f"{prompt}\nIndeed {body['chat_id']}."}

    def _serve(self, answer: Callable[[Any], Any]) -> Any:
        with self._lock:
            self.bodies.append((request.path, request.get_json()))
            self.request_ids.append(request.headers.get("X-Request-Id"))
            fault = self.faults.pop(0) if self.faults else None
            self._num_running += 1
            self.max_concurrent = max(self.max_concurrent, self._num_running)
        try:
            if fault is not None:
                status, headers, value = fault
                if isinstance(value, str):
                    return Response(value, status, headers, mimetype="application/json")
                return jsonify(value), status, headers
            time.sleep(self.delay_s)
            return jsonify(answer(request.get_json()))
        except Exception as exc:
            return jsonify(detail=str(exc)), 500
        finally:
            with self._lock:
                self._num_running -= 1


@contextmanager
def listening(app: Flask, port: int = 0) -> Iterator[str]:
    """Serve an application on a thread; yields its URL."""
    sockets: dict[int, Any] = {}
    server: Any = create_server(app, map=sockets, listen=f"127.0.0.1:{port}", threads=32)
    stopping = threading.Event()

    def loop() -> None:
        while not stopping.is_set():
            wasyncore.loop(timeout=0.02, map=sockets, count=1)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        stopping.set()
        thread.join()
        server.task_dispatcher.shutdown()
        wasyncore.close_all(sockets)


@contextmanager
def legacy_host(port: int = 0, **settings: Any) -> Iterator[LegacyHost]:
    """A `LegacyHost` that is listening."""
    host = LegacyHost(**settings)
    with listening(host.app(), port) as host.url:
        yield host
