"""One file answered by every backend: equal bytes, recovery from killed processes, and speed.

    python -m benchmarks.cluster same [LINES]             compare the outputs of all backends
    python -m benchmarks.cluster killed [LINES]           do so while processes are killed
    python -m benchmarks.cluster speed [LINES [ROUNDS]]   seconds per backend, alternating
    python -m benchmarks.cluster gateway                  start-up time and memory of a gateway

Uses float32, one thread per engine, and three Ray nodes on this machine.
"""

import hashlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.server_harness import Target, print_line, target

NUM_LINES = 500
ENGINE = ("--dtype", "float32", "--threads", "1")
TOPICS = ("rivers", "stars", "bread", "clocks", "maps", "bees", "rain", "chess", "wool", "tides")
POLL_S = 0.05


def write_questions(path: Path, num_lines: int) -> None:
    """Short, distinct questions; every 50th is sampled, every 60th is invalid."""
    source = random.Random(1)
    lines = []
    for number in range(1, num_lines + 1):
        prompt = f"Tell {source.randint(2, 99)} things about {source.choice(TOPICS)}, {number}."
        query = {"chat_id": str(number), "user_prompt": prompt}
        if number % 50 == 0:
            query["temperature"] = 0.8
        lines.append("{broken" if number % 60 == 0 else json.dumps(query))
    path.write_text("\n".join(lines) + "\n", "utf-8")


class Runs:
    """Runs of `smol run` on one file, each with its own output."""

    def __init__(self, folder: Path, num_lines: int) -> None:
        self.folder = folder
        self.questions = folder / "questions.jsonl"
        write_questions(self.questions, num_lines)

    def start(self, name: str, *options: str) -> "subprocess.Popen[bytes]":
        """Start or resume a run."""
        command = [sys.executable, "-m", "smolcli", "run", str(self.questions), "-q", "--seed", "3"]
        command += ["-o", str(self.output(name)), "--max-new-tokens", "8", *ENGINE, *options]
        return subprocess.Popen(command)

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def finish(self, name: str, *options: str) -> float:
        """Run to completion; returns its seconds, without loading the model."""
        if (code := self.start(name, *options).wait()) != 3:  # some lines are invalid
            raise SystemExit(f"{name} exited with {code}")
        manifest = self.output(name).with_name(f"{name}.jsonl.manifest.json")
        seconds: float = json.loads(manifest.read_bytes())["report"]["seconds"]
        return seconds

    def await_lines(self, name: str, num_lines: int, popen: "subprocess.Popen[bytes]") -> None:
        """Wait until a run has written `num_lines` results."""
        while num_written(self.output(name)) < num_lines:
            if popen.poll() is not None:
                raise SystemExit(f"{name} exited before it could be disturbed")
            time.sleep(POLL_S)

    def print_hash(self, name: str, remark: str = "") -> None:
        """Print the output's hash, and whether it equals that of the local run."""
        data = self.output(name).read_bytes()
        is_same = data == self.output("local").read_bytes()
        digest = hashlib.sha256(data).hexdigest()[:16]
        num_lines = num_written(self.output(name))
        print_line(f"{name:<12} {num_lines} lines  {digest}  same: {is_same}  {remark}")


def num_written(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def service(port: int = 0) -> Any:
    """A context manager that runs a model service."""
    return target(None, *ENGINE, "--port", str(port))


@contextmanager
def ray_nodes() -> Iterator[str]:
    """A Ray cluster of three nodes on this machine; yields its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(3):
        options = {} if cluster.head_node else {"include_dashboard": False}
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20, **options)
    cluster.wait_for_nodes()
    try:
        yield str(cluster.address)
    finally:
        cluster.shutdown()


@contextmanager
def routes() -> Iterator[dict[str, tuple[str, ...]]]:
    """Every route to a model: options of `smol run`, by name."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(service()) for _ in range(2))
        front = stack.enter_context(target(None, "--upstream", one.url))
        front_of_two = stack.enter_context(
            target(None, "--upstream", one.url, "--upstream", two.url)
        )
        on_ray = ("--backend", "ray", "--ray-address", stack.enter_context(ray_nodes()))
        yield {
            "local": (),
            "via": ("--via", one.url),
            "gateway": ("--via", front.url),
            "gateway-of-2": ("--via", front_of_two.url),
            "ray-1": (*on_ray, "--ray-workers", "1"),
            "ray-3": on_ray,
        }


def same(num_lines: int) -> None:
    """Run every route once and compare the outputs."""
    with scratch() as folder, routes() as options_of:
        runs = Runs(folder, num_lines)
        for name, options in options_of.items():
            seconds = runs.finish(name, *options)
            runs.print_hash(name, f"{seconds:.1f} s")


def speed(num_lines: int, num_rounds: int) -> None:
    """Time all routes alternately, so that other load on the machine affects all of them."""
    with scratch() as folder, routes() as options_of:
        runs = Runs(folder, num_lines)
        seconds: dict[str, list[float]] = {name: [] for name in options_of}
        for _ in range(num_rounds):
            for name, options in options_of.items():
                seconds[name].append(runs.finish(name, "--overwrite", *options))
    for name, values in seconds.items():
        ratios = [mine / local for mine, local in zip(values, seconds["local"], strict=True)]
        rate = num_lines / statistics.median(values)
        print_line(
            f"{name:<12} {rate:6.1f} lines/s  {statistics.median(ratios):.2f} of the local time  "
            f"{' '.join(f'{value:.1f}' for value in values)}"
        )


def killed(num_lines: int) -> None:
    """Kill a service or worker when a third of the results is written, and restart it."""
    with scratch() as folder:
        runs = Runs(folder, num_lines)
        runs.finish("local")
        runs.print_hash("local")
        restart_service(runs, "gateway", has_gateway=True)
        restart_service(runs, "via", has_gateway=False)
        resume_run(runs)
        with ray_nodes() as address:
            on_ray = ("--backend", "ray", "--ray-address", address)
            popen = runs.start("ray", *on_ray)
            runs.await_lines("ray", num_lines // 3, popen)
            ray_workers()[0].kill()
            await_exit(runs, "ray", popen)


def restart_service(runs: Runs, name: str, has_gateway: bool) -> None:
    """Restart the service while the run is still retrying."""
    port = free_port()
    retries = ("--retry-for", "120")
    with ExitStack() as stack:
        first = stack.enter_context(service(port))
        front = (
            stack.enter_context(target(None, "--upstream", first.url, *retries))
            if has_gateway
            else first
        )
        popen = runs.start(name, "--via", front.url, *retries)
        runs.await_lines(name, num_written(runs.output("local")) // 3, popen)
        kill(first)
        with service(port):
            await_exit(runs, name, popen)


def resume_run(runs: Runs) -> None:
    """Restart the service only after the run has given up, then resume the run."""
    port = free_port()
    with service(port) as first:
        options = ("--via", first.url, "--retry-for", "1")
        popen = runs.start("resumed", *options)
        runs.await_lines("resumed", num_written(runs.output("local")) // 3, popen)
        kill(first)
        code, num_lines = popen.wait(), num_written(runs.output("resumed"))
    with service(port):
        runs.finish("resumed", *options)
    runs.print_hash("resumed", f"exit {code} with {num_lines} lines, then exit 3")


def await_exit(runs: Runs, name: str, popen: "subprocess.Popen[bytes]") -> None:
    code = popen.wait()
    runs.print_hash(name, f"exit {code}")


def kill(server: Target) -> None:
    assert server.process is not None
    server.process.kill()


def ray_workers() -> list[psutil.Process]:
    """The worker processes of this process' own cluster."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if "".join(p.cmdline()).startswith("ray::Worker")]


def gateway() -> None:
    """Start a gateway five times, with an upstream that does not exist."""
    starts, sizes = [], []
    for _ in range(5):
        port = free_port()
        command = [sys.executable, "-m", "smolcli", "serve", "--port", str(port)]
        command += ["--upstream", "http://127.0.0.1:9"]
        began = time.perf_counter()
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as popen:
            while not is_open(port):
                time.sleep(0.005)
            starts.append(time.perf_counter() - began)
            sizes.append(psutil.Process(popen.pid).memory_info().rss)
            popen.terminate()
    start_s, num_bytes = statistics.median(starts), statistics.median(sizes)
    print_line(f"a gateway listens after {start_s:.2f} s and uses {num_bytes / 1e6:.0f} MB")


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["same", *rest]:
            same(*map(int, rest or [str(NUM_LINES)]))
        case ["killed", *rest]:
            killed(*map(int, rest or [str(NUM_LINES)]))
        case ["speed", *rest]:
            speed(*map(int, rest or ["200", "3"]))
        case ["gateway"]:
            gateway()
        case _:
            raise SystemExit(__doc__)
