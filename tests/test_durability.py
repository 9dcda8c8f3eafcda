"""`smol run` as a process that is killed: no result lost or repeated, and the same bytes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_tools import native_kernels

from smolcli.batch.manifest import load_manifest
from smolcli.settings import ResolvedDtype

NUM_LINES = 200
NUM_KILLS = 4
DEADLINE_S = 240


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Valid, invalid and blank lines; some queries have settings of their own."""
    source = random.Random(1)
    lines = []
    for number in range(1, NUM_LINES + 1):
        query = {"chat_id": number, "user_prompt": "word " * source.randint(1, 40)}
        if number % 7 == 0:
            query["max_new_tokens"] = source.randint(1, 60)
        if number % 11 == 0:
            query |= {"temperature": 0.9, "top_p": 0.9}
        lines.append("" if number % 50 == 0 else json.dumps(query) if number % 9 else "{broken")
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def start(questions: Path, output: Path, model: Path, dtype: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "smolcli", "run", str(questions), "-o", str(output), "--quiet"]
    options = ["--model", str(model), "--dtype", dtype, "--seed", "3", "--max-new-tokens", "24"]
    return subprocess.Popen([*command, *options, "--max-batch-size", "8", "--threads", "1"])


def finish(process: "subprocess.Popen[bytes]") -> int:
    return process.wait(DEADLINE_S)


def kill_at_random(process: "subprocess.Popen[bytes]", output: Path, source: random.Random) -> None:
    """Kill the process with SIGKILL after it has written a random number of bytes."""
    size = output.stat().st_size if output.exists() else 0
    grown = size + source.choice([0, 1, 500, 2000, 5000])
    deadline = time.monotonic() + DEADLINE_S
    while process.poll() is None and (output.stat().st_size if output.exists() else 0) < grown:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(source.uniform(0, 0.15))
    process.send_signal(signal.SIGKILL) if sys.platform != "win32" else process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_run_killed_repeatedly_ends_with_the_same_bytes(
    questions: Path, tiny_folder: Path, dtype: ResolvedDtype
) -> None:
    """The bytes equal those of an undisturbed run, and the manifest records the dtype."""
    native_kernels(dtype)
    whole, torn = questions.with_name("whole.jsonl"), questions.with_name("torn.jsonl")
    assert finish(start(questions, whole, tiny_folder, dtype)) == 3
    source = random.Random(4)
    num_kills = NUM_KILLS if dtype == "float32" else 1
    for _ in range(num_kills):
        before = torn.read_bytes() if torn.exists() else b""
        kill_at_random(start(questions, torn, tiny_folder, dtype), torn, source)
        after = torn.read_bytes() if torn.exists() else b""
        kept = before[: before.rfind(b"\n") + 1]
        assert after.startswith(kept), "written lines never change"
    assert finish(start(questions, torn, tiny_folder, dtype)) == 3
    expected = [json.loads(line) for line in whole.read_text("utf-8").splitlines()]
    resumed = [json.loads(line) for line in torn.read_text("utf-8").splitlines()]
    assert [r["line"] for r in resumed] == [r["line"] for r in expected]
    assert [r.get("error") for r in resumed] == [r.get("error") for r in expected]
    assert torn.read_bytes() == whole.read_bytes()
    backends = [load_manifest(path).backend for path in (torn, whole)]
    assert [backend and backend["dtype"] for backend in backends] == [dtype, dtype]
    assert finish(start(questions, torn, tiny_folder, dtype)) == 3, (
        "a complete run is left untouched"
    )
