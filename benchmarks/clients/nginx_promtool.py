"""smol behind nginx with the configuration of docs/serving.md, and promtool on its metrics.

    python -m benchmarks.clients.nginx_promtool [MODEL]

Needs `nginx` and `promtool` on the PATH. Prints one line per check and exits with 1 if any fails.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
WAIT_S = 300
CHAT = {"chat_id": "1", "user_prompt": "What is the capital of France?", "max_new_tokens": 40}
STREAM = {"model": "m", "messages": [{"role": "user", "content": "Count to ten."}], "stream": True}


def main() -> None:
    smol_port, port = free_port(), free_port()
    model = ["--model", sys.argv[1]] if len(sys.argv) > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(nginx_config(smol_port, port, Path(folder)), "utf-8")
        command = [sys.executable, "-m", "smolcli", "serve", "--port", str(smol_port), *model]
        smol = subprocess.Popen([*command, "--any-model"], stderr=subprocess.DEVNULL)
        nginx = subprocess.Popen([shutil.which("nginx") or "nginx", "-c", str(config)])
        try:
            wait_until_ready(port)
            checks = {
                "chat": chat(port),
                "stream arrives in pieces": stream(port),
                "NDJSON": ndjson(port),
                "request id passes through": request_id(port),
                "connections to smol are kept": connections(smol_port, port),
                "promtool check metrics": promtool(smol_port),
            }
        finally:
            for process in (nginx, smol):
                process.terminate()
                process.wait()
    for name, outcome in checks.items():
        sys.stdout.write(f"{name}: {outcome}\n")
    sys.exit(any(not outcome.startswith("ok") for outcome in checks.values()))


def nginx_config(smol_port: int, port: int, folder: Path) -> str:
    """The documented configuration, without TLS and on free ports."""
    block = re.search(r"```nginx\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert block is not None
    site = re.sub(r"\n *(ssl_certificate\w*|server_name) .*", "", block[1])
    site = site.replace("127.0.0.1:8000", f"127.0.0.1:{smol_port}")
    site = site.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    log = f"access_log {folder}/access.log;\n"
    return (
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\n{paths}{log}{site}}}\n"
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def post(port: int, path: str, body: object, **headers: str) -> tuple[dict[str, str], list[bytes]]:
    """The headers and the pieces of a response, as they arrive."""
    connection = HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    connection.request(
        "POST", path, json.dumps(body), {"Content-Type": "application/json"} | headers
    )
    response = connection.getresponse()
    pieces = []
    while piece := response.read1(65536):
        pieces.append(piece)
    connection.close()
    assert response.status == 200, (response.status, pieces)
    return {name.lower(): value for name, value in response.getheaders()}, pieces


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit("the server did not become ready")


def chat(port: int) -> str:
    _, pieces = post(port, "/chat", CHAT)
    return f"ok, {json.loads(b''.join(pieces))['response']!r}"


def stream(port: int) -> str:
    headers, pieces = post(port, "/v1/chat/completions", STREAM)
    is_whole = pieces[-1].endswith(b"data: [DONE]\n\n")
    is_stream = headers["content-type"].startswith("text/event-stream") and len(pieces) > 3
    return f"{'ok' if is_whole and is_stream else 'FAILED'}, {len(pieces)} pieces"


def ndjson(port: int) -> str:
    queries = [CHAT | {"chat_id": str(n), "max_new_tokens": 4 + 40 * (n == 0)} for n in range(4)]
    _, pieces = post(port, "/chat/batched", {"queries": queries}, Accept="application/x-ndjson")
    records = [json.loads(line) for line in b"".join(pieces).splitlines()]
    is_complete = sorted(r["index"] for r in records) == [*range(4)]
    return f"{'ok' if is_complete else 'FAILED'}, in the order {[r['index'] for r in records]}"


def request_id(port: int) -> str:
    headers, _ = post(port, "/chat", CHAT)
    is_nginx = re.fullmatch(r"[0-9a-f]{32}", headers.get("x-request-id", ""))
    return "ok" if is_nginx else f"FAILED, {headers}"


def connections(smol_port: int, port: int) -> str:
    """nginx sends many requests over few connections."""
    before = opened_by_nginx(smol_port)
    for _ in range(20):
        post(port, "/chat", CHAT | {"max_new_tokens": 1})
    left = opened_by_nginx(smol_port)
    return f"{'ok' if left <= before + 1 else 'FAILED'}, {left} connections after 20 more requests"


def opened_by_nginx(smol_port: int) -> int:
    """Connections to smol that are established or were closed a moment ago."""
    lines = Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]
    return sum(f":{smol_port:04X}" in line.split()[2] for line in lines)


def promtool(smol_port: int) -> str:
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{smol_port}/metrics").read()
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True)
    talk = (done.stdout + done.stderr).decode().strip().replace("\n", "; ")
    return f"ok, {metrics.count(b'# TYPE')} metrics" if done.returncode == 0 else f"FAILED: {talk}"


if __name__ == "__main__":
    main()
