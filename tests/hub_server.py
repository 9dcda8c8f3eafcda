"""A Hugging Face Hub on loopback that has one model."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from model_stores import COMMIT, MODEL


class FakeHub(BaseHTTPRequestHandler):
    """The few routes of the Hub that a download needs; `folder` contains the only model."""

    folder: Path
    requested: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        api, files = f"/api/models/{MODEL}", f"/{MODEL}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main"):
            self.reply(json.dumps({"id": MODEL, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{api}/tree/"):
            self.reply(json.dumps([self.entry(p) for p in self.folder.iterdir()]).encode())
        elif path.startswith(files):
            self.requested.append(path.removeprefix(files))
            self.reply((self.folder / path.removeprefix(files)).read_bytes())
        else:
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def entry(self, path: Path) -> dict[str, object]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Do not log requests."""
