"""Prometheus scrapes smol, and every query of the dashboard and the autoscaler returns data.

    python -m benchmarks.clients.prometheus_grafana [MODEL]

Needs `prometheus` on the PATH. Prints one line per query and exits with 1 if any has no data.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.clients.nginx_promtool import free_port, wait_until_ready

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "smol.json"
SCALER = ROOT / "deploy" / "kubernetes" / "base" / "autoscaler.yaml"
ADAPTER = ROOT / "docs" / "deployment.md"
WAIT_S = 120
POD = {"namespace": "default", "pod": "smol-0"}  # labels that Kubernetes' discovery adds
CONFIG = {
    "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
    "scrape_configs": [{"job_name": "smol", "static_configs": [{"labels": POD}]}],
}


def main() -> None:
    smol_port, port = free_port(), free_port()
    model = ["--model", sys.argv[1]] if len(sys.argv) > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        CONFIG["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{smol_port}"]  # type: ignore[index]
        config.write_text(yaml.safe_dump(CONFIG), "utf-8")
        command = [sys.executable, "-m", "smolcli", "serve", "--port", str(smol_port), *model]
        command += ["--any-model", "--max-batch-size", "2"]  # so that queries wait
        smol = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        options += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        prometheus = subprocess.Popen(["prometheus", *options])
        try:
            wait_until_ready(smol_port)
            outcomes = evaluate(smol_port, port)
        finally:
            for process in (prometheus, smol):
                process.terminate()
                process.wait()
    for name, outcome in outcomes.items():
        sys.stdout.write(f"{name}: {outcome or 'NO DATA'}\n")
    sys.exit(any(not outcome for outcome in outcomes.values()))


def evaluate(smol_port: int, port: int) -> dict[str, str]:
    """The value of every query; traffic runs until all have one."""
    outcomes: dict[str, str] = dict.fromkeys(queries(), "")
    end = time.monotonic() + WAIT_S
    while not all(outcomes.values()) and time.monotonic() < end:
        traffic(smol_port)
        for name, query in queries().items():
            outcomes[name] = ask_prometheus(port, query) or outcomes[name]
    return outcomes


def queries() -> dict[str, str]:
    """The queries by name, with Grafana's and the adapter's variables filled in."""
    found = {}
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            name = f"{panel['title']} ({target['refId']})"
            query = target["expr"].replace("$__rate_interval", "1m")
            found[name] = re.sub(r"\$(job|instance)", ".+", query)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            found[f"${variable['name']}"] = f"count by ({label}) ({series})".replace("$job", ".+")
    (metric,) = yaml.safe_load(SCALER.read_text("utf-8"))["spec"]["metrics"]
    rule = re.search(r"metricsQuery: '(.*)'", ADAPTER.read_text("utf-8"))
    assert rule is not None
    labels = ",".join(f'{name}="{value}"' for name, value in POD.items())
    query = rule[1].replace("<<.Series>>", metric["pods"]["metric"]["name"])
    found["autoscaler"] = query.replace("<<.LabelMatchers>>", labels)
    return found


def traffic(smol_port: int) -> None:
    """Concurrent streams, equal queries and errors."""
    ask = {"user_prompt": "What is the capital of France?", "max_new_tokens": 16}
    stream = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    bodies: list[tuple[str, dict[str, Any]]] = [("/chat", {"chat_id": "0"})]
    bodies += [("/chat", {"chat_id": str(i), **ask}) for i in range(4)]
    bodies += [("/v1/chat/completions", {**stream, "max_tokens": 8 + i}) for i in range(4)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(lambda item: post(f"http://127.0.0.1:{smol_port}{item[0]}", item[1]), bodies))


def post(url: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        urllib.request.urlopen(request, timeout=WAIT_S).read()
    except urllib.error.HTTPError as exc:
        exc.close()


def ask_prometheus(port: int, query: str) -> str:
    """The values now, without NaN; empty if there are none."""
    text = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(
        f"http://127.0.0.1:{port}/api/v1/query?{text}", timeout=30
    ) as answer:
        result = json.load(answer)["data"]["result"]
    series = [(item["metric"], item["value"][1]) for item in result if item["value"][1] != "NaN"]
    return "; ".join(
        " ".join([*labels.values(), f"{float(value):.4g}"]) for labels, value in series
    )


if __name__ == "__main__":
    main()
