"""One file answered by every backend: equal bytes, recovery from killed processes, and speed.

python benchmarks/cluster.py same [LINES]       answer with every backend and compare the hashes
python benchmarks/cluster.py killed [LINES]     kill processes during the runs, compare the hashes
python benchmarks/cluster.py speed [LINES [ROUNDS]]   seconds per backend, alternating
python benchmarks/cluster.py gateway            start-up time and memory of a gateway

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
from server_harness import Target, target

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
    """`smol run` on one file, with outputs of their own."""

    def __init__(self, folder: Path, num_lines: int) -> None:
        self.folder = folder
        self.questions = folder / "questions.jsonl"
        write_questions(self.questions, num_lines)

    def start(self, name: str, *way: str) -> "subprocess.Popen[bytes]":
        """Begin a run, or go on with it."""
        command = [sys.executable, "-m", "smolcli", "run", str(self.questions), "-q", "--seed", "3"]
        command += ["-o", str(self.output(name)), "--max-new-tokens", "8", *ENGINE, *way]
        return subprocess.Popen(command)

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def finish(self, name: str, *way: str) -> float:
        """A whole run; gives the seconds that it took, without loading a model."""
        if (code := self.start(name, *way).wait()) != 3:  # some lines are bad
            raise SystemExit(f"{name} ended with {code}")
        manifest = self.output(name).with_name(f"{name}.jsonl.manifest.json")
        seconds: float = json.loads(manifest.read_bytes())["report"]["seconds"]
        return seconds

    def await_lines(self, name: str, num_lines: int, popen: "subprocess.Popen[bytes]") -> None:
        """Until so many results are there."""
        while num_written(self.output(name)) < num_lines:
            if popen.poll() is not None:
                raise SystemExit(f"{name} ended before it could be disturbed")
            time.sleep(POLL_S)

    def tell(self, name: str, remark: str = "") -> None:
        """Print the output's hash, and whether it is the local run's."""
        data = self.output(name).read_bytes()
        is_same = data == self.output("local").read_bytes()
        digest = hashlib.sha256(data).hexdigest()[:16]
        num_lines = num_written(self.output(name))
        say(f"{name:<12} {num_lines} lines  {digest}  same: {is_same}  {remark}")


def num_written(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def service(port: int = 0) -> Any:
    """A model service, as a context."""
    return target(None, *ENGINE, "--port", str(port))


@contextmanager
def ray_nodes() -> Iterator[str]:
    """Three nodes on this machine; gives the address of the cluster."""
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
def ways() -> Iterator[dict[str, tuple[str, ...]]]:
    """Every way to a model, by name, as options of `smol run`."""
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
    """Each way once."""
    with scratch() as folder, ways() as options:
        runs = Runs(folder, num_lines)
        for name, way in options.items():
            seconds = runs.finish(name, *way)
            runs.tell(name, f"{seconds:.1f} s")


def speed(num_lines: int, num_rounds: int) -> None:
    """Each way by turns; other work on the machine then slows all of them alike."""
    with scratch() as folder, ways() as options:
        runs = Runs(folder, num_lines)
        seconds: dict[str, list[float]] = {name: [] for name in options}
        for _ in range(num_rounds):
            for name, way in options.items():
                seconds[name].append(runs.finish(name, "--overwrite", *way))
    for name, values in seconds.items():
        ratios = [mine / local for mine, local in zip(values, seconds["local"], strict=True)]
        rate = num_lines / statistics.median(values)
        say(
            f"{name:<12} {rate:6.1f} lines/s  {statistics.median(ratios):.2f} of the local time  "
            f"{' '.join(f'{value:.1f}' for value in values)}"
        )


def killed(num_lines: int) -> None:
    """Whoever computes is killed when a third is written, and started again by a supervisor."""
    with scratch() as folder:
        runs = Runs(folder, num_lines)
        runs.finish("local")
        runs.tell("local")
        through(runs, "gateway", has_gateway=True)
        through(runs, "via", has_gateway=False)
        by_resuming(runs)
        with ray_nodes() as address:
            on_ray = ("--backend", "ray", "--ray-address", address)
            popen = runs.start("ray", *on_ray)
            runs.await_lines("ray", num_lines // 3, popen)
            ray_workers()[0].kill()
            tell_end(runs, "ray", popen)


def through(runs: Runs, name: str, has_gateway: bool) -> None:
    """The service is back while the run waits for it."""
    port = free_port()
    waits = ("--retry-for", "120")
    with ExitStack() as stack:
        first = stack.enter_context(service(port))
        front = (
            stack.enter_context(target(None, "--upstream", first.url, *waits))
            if has_gateway
            else first
        )
        popen = runs.start(name, "--via", front.url, *waits)
        runs.await_lines(name, num_written(runs.output("local")) // 3, popen)
        kill(first)
        with service(port):
            tell_end(runs, name, popen)


def by_resuming(runs: Runs) -> None:
    """The service stays away until the run has given up; then the same command goes on."""
    port = free_port()
    with service(port) as first:
        way = ("--via", first.url, "--retry-for", "1")
        popen = runs.start("resumed", *way)
        runs.await_lines("resumed", num_written(runs.output("local")) // 3, popen)
        kill(first)
        code, num_lines = popen.wait(), num_written(runs.output("resumed"))
    with service(port):
        runs.finish("resumed", *way)
    runs.tell("resumed", f"exit {code} with {num_lines} lines, then exit 3")


def tell_end(runs: Runs, name: str, popen: "subprocess.Popen[bytes]") -> None:
    code = popen.wait()
    runs.tell(name, f"exit {code}")


def kill(server: Target) -> None:
    assert server.process is not None
    server.process.kill()


def ray_workers() -> list[psutil.Process]:
    """Those of this process' cluster, and of no other on the machine."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if "".join(p.cmdline()).startswith("ray::Worker")]


def gateway() -> None:
    """Start a gateway five times, the upstream being a port where nobody listens."""
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
    say(f"a gateway listens after {start_s:.2f} s and takes {num_bytes / 1e6:.0f} MB")


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


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


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
