"""`smol run --backend ray` on three nodes: the bytes of a local run, whatever is killed."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from model_stores import MODEL, fill_store

import smolcli
from smolcli.batch.manifest import load_manifest
from smolcli.errors import BackendError

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.timeout(900),  # a cluster takes minutes to start and to heal on a busy machine
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
    # Ray closes files and sockets only when the process ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

NUM_LINES = 160
NUM_SENT = 24  # lines that are asked of a node that was sent the model
DEADLINE_S = 600
SETTINGS = ["--dtype", "float32", "--seed", "3", "--max-batch-size", "8", "--threads", "1"]
SETTINGS += ["--no-dedupe"]  # so that there is enough work for all workers

Cluster = Any


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three Ray nodes on this machine with one CPU each; their processes are gone afterwards."""
    from ray.cluster_utils import Cluster

    before = ray_processes()
    nodes: Any = Cluster()
    for _ in range(3):
        add_node(nodes)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()
    deadline = time.monotonic() + DEADLINE_S
    while left := ray_processes() - before:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def add_node(cluster: Cluster, **options: Any) -> Any:
    options = {"num_cpus": 1, "object_store_memory": 100 << 20} | options
    if not cluster.head_node:
        options["include_dashboard"] = False
    return cluster.add_node(**options)


def ray_processes() -> set[psutil.Process]:
    """All Ray processes on this machine."""
    names = ("ray::", "raylet", "gcs_server", "default_worker")
    return {
        process
        for process in psutil.process_iter()
        if any(name in " ".join(command(process)) for name in names)
    }


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid and invalid lines, some with their own settings."""
    source = random.Random(1)
    path = tmp_path_factory.mktemp("ray") / "questions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, NUM_LINES + 1):
            query = {"chat_id": number, "user_prompt": "word " * source.randint(1, 40)}
            if number % 11 == 0:
                query |= {"temperature": 0.9, "metadata": {"n": number}, "stop": "e"}
            file.write("{broken\n" if number % 9 == 0 else json.dumps(query) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(questions: Path, tiny_folder: Path) -> Path:
    """The output of a local run."""
    output = questions.with_name("local.jsonl")
    process = start(questions, output, "--model", str(tiny_folder))
    assert process.wait(DEADLINE_S) == 3
    return output


def start(questions: Path, output: Path, *options: str, **how: Any) -> "subprocess.Popen[bytes]":
    """`smol run`, outside the repository, because workers would inherit its path."""
    arguments = [str(questions), "-o", str(output), "--max-new-tokens", "160"]
    return subprocess.Popen(
        [sys.executable, "-m", "smolcli", "run", *arguments, *SETTINGS, *options],
        cwd=questions.parent,
        **how,
    )


def start_on(
    cluster: Cluster, questions: Path, output: Path, *options: str, **how: Any
) -> "subprocess.Popen[bytes]":
    address = ["--backend", "ray", "--ray-address", cluster.address]
    return start(questions, output, *address, *options, **how)


def workers() -> list[psutil.Process]:
    """Worker processes of the cluster that this process started."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if "".join(command(p)).startswith("ray::Worker")]


def raylet(node: Any) -> int:
    """Process id of a node, which is the parent of its workers."""
    return int(node.all_processes["raylet"][0].process.pid)


def await_workers(process: "subprocess.Popen[bytes]") -> dict[int, psutil.Process]:
    """One worker for each of the three nodes, by the process id of its node."""
    deadline = time.monotonic() + DEADLINE_S
    while len(found := {p.ppid(): p for p in workers()}) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def await_lines(output: Path, num_lines: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (output.exists() and output.read_bytes().count(b"\n") >= num_lines):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_cluster_run_equals_a_local_run(
    cluster: Cluster, questions: Path, whole: Path, tiny_folder: Path
) -> None:
    """Even if the driver is killed and the same command resumes the run."""
    output = questions.with_name("cluster.jsonl")
    process = start_on(cluster, questions, output, "--model", str(tiny_folder))
    await_lines(output, 60, process)
    await_workers(process)
    process.kill()
    process.wait()
    written = output.read_bytes()
    assert len(written) < whole.stat().st_size
    process = start_on(cluster, questions, output, "--model", str(tiny_folder))
    assert process.wait(DEADLINE_S) == 3
    assert output.read_bytes() == whole.read_bytes()
    assert load_manifest(output).backend == load_manifest(whole).backend, (
        "a local run may resume it"
    )


def test_killing_workers_and_nodes_loses_nothing(
    cluster: Cluster, questions: Path, whole: Path, tiny_folder: Path
) -> None:
    """A worker on one node is killed, and another node as a whole while it is being replaced."""
    output = questions.with_name("killed.jsonl")
    process = start_on(
        cluster,
        questions,
        output,
        *("--model", str(tiny_folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    await_lines(output, 20, process)
    first, second = sorted(cluster.worker_nodes, key=raylet)
    found = await_workers(process)
    victims = [found[raylet(node)] for node in (first, second)]
    for victim in victims:
        victim.suspend()  # so that neither finishes before it is killed
    victims[0].kill()
    cluster.remove_node(second, allow_graceful=False)
    with suppress(psutil.NoSuchProcess):  # it may have ended with its node
        victims[1].kill()
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3, stderr.decode()
    assert stderr.decode().count("lost a Ray worker") >= 2, stderr.decode()
    assert output.read_bytes() == whole.read_bytes()
    assert stdout == b"", "Ray would print events of its processes here"


@pytest.fixture
def other_node(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Adds a node larger than the others; removed after the test."""
    added: list[Any] = []

    def add(**environment: str) -> None:
        added.append(add_node(cluster, num_cpus=2, env_vars=environment))

    yield add
    for node in added:
        cluster.remove_node(node)


def test_the_model_is_sent_to_a_node_that_lacks_it(
    cluster: Cluster,
    other_node: Callable[..., Any],
    questions: Path,
    whole: Path,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    fill_store(tmp_path / "here", tiny_folder)
    other_node(SMOL_HOME=str(tmp_path / "there"), HF_HOME=str(tmp_path / "hub"))
    output = questions.with_name("sent.jsonl")
    # Two threads: only the new node has as many CPUs.
    process = start_on(
        cluster,
        questions,
        output,
        *("--model", MODEL, "--threads", "2", "--limit", str(NUM_SENT)),
        env=os.environ | {"SMOL_HOME": str(tmp_path / "here")},
    )
    assert process.wait(DEADLINE_S) == 3
    assert [p.name for p in (tmp_path / "there" / "models").glob("shipped*")] == ["shipped--abc"]
    assert output.read_bytes().splitlines() == whole.read_bytes().splitlines()[:NUM_SENT]


def test_a_node_with_another_version_is_rejected(
    cluster: Cluster,
    other_node: Callable[..., Any],
    questions: Path,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    package = Path(smolcli.__file__).parent
    shutil.copytree(package, tmp_path / "smolcli", ignore=shutil.ignore_patterns("__pycache__"))
    init = tmp_path / "smolcli" / "__init__.py"
    init.write_text(init.read_text("utf-8").replace(smolcli.__version__, "0.0.0"), "utf-8")
    other_node(PYTHONPATH=str(tmp_path))
    output = tmp_path / "refused.jsonl"
    process = start_on(
        cluster,
        questions,
        output,
        *("--model", str(tiny_folder), "--threads", "2"),
        stderr=subprocess.PIPE,
    )
    _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert f"has smol 0.0.0, and this machine {smolcli.__version__}" in stderr.decode()
    assert b"Traceback" not in stderr
    assert not output.exists()


def test_a_node_with_other_kernels_is_rejected() -> None:
    from smolcli.backends.ray.backend import check_kernels

    native = {"kernels": "native", "kernel_variant": "x86-64-v3-bfloat16"}
    check_kernels("b", native, native)
    with pytest.raises(BackendError, match="node b computes with torch kernels and another"):
        check_kernels("b", {"kernels": "torch", "kernel_variant": None}, native)
    with pytest.raises(BackendError, match="computes with x86-64-v4-bfloat16 kernels"):
        check_kernels("b", native | {"kernel_variant": "x86-64-v4-bfloat16"}, native)


def test_a_cluster_that_is_too_small_is_a_usage_error(
    cluster: Cluster, questions: Path, tiny_folder: Path
) -> None:
    output = questions.with_name("small.jsonl")
    options = ["--model", str(tiny_folder), "--threads", "64", "--ray-gpus-per-worker", "1"]
    process = start_on(cluster, questions, output, *options, stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert b"no node of the Ray cluster has 64 CPUs and 1 GPUs" in stderr


def test_address_without_a_cluster_is_an_error(questions: Path, tiny_folder: Path) -> None:
    output = questions.with_name("nowhere.jsonl")
    options = ["--model", str(tiny_folder), "--backend", "ray", "--ray-address", "127.0.0.1:9"]
    process = start(questions, output, *options, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert b"no Ray cluster listens at 127.0.0.1:9" in stderr
    assert stdout == b""


def test_without_ray_the_error_says_what_to_install(questions: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from smolcli.cli.main import app\n"
        f"sys.argv = ['smol', 'run', {str(questions)!r}, '-o', '-', '--backend', 'ray']\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"pip install 'smolcli[ray]'" in done.stderr
