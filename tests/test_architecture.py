"""Imports between packages point down, and light commands stay light."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from kernel_tools import native_kernels

from tools import import_graph

PACKAGE = Path(__file__).parents[1] / "smolcli"
LAYERS = [  # top to bottom: a package imports only from the rows below its own
    ["__main__"],
    ["cli"],
    ["html_report", "server", "bench", "llm"],
    ["batch"],
    ["data", "backends"],
    ["weights", "text"],
    ["engine", "protocol"],
    ["settings"],
    ["atomic"],
    ["errors"],
    ["types"],
]
TORCH = {"torch", "transformers"}
TORCH_ALLOWED = ("engine.torch_ops", "weights.loader", "bench.transformers_peer")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


@cache
def imported(path: Path) -> frozenset[str]:
    return frozenset(import_graph.imported(path))


def package(module: str) -> str:
    return module.partition(".")[0]


def layer(module: str) -> int:
    rows = [index for index, row in enumerate(LAYERS) if package(module) in row]
    assert rows, f"{package(module)} is in no layer: add it to LAYERS"
    return rows[0]


def test_imports_point_down() -> None:
    upward = [
        f"{name} imports {other}"
        for name, path in modules()
        if name != "__init__"
        for other in (
            m.removeprefix("smolcli.") for m in imported(path) if m.startswith("smolcli.")
        )
        if package(name) != package(other) and layer(other) <= layer(name)
    ]
    assert upward == []


def test_only_few_modules_import_torch() -> None:
    users = {name for name, path in modules() if any(i.startswith("torch") for i in imported(path))}
    assert {u for u in users if not u.startswith(TORCH_ALLOWED)} == set()


def test_only_conversion_and_the_benchmark_import_transformers() -> None:
    users = {
        name
        for name, path in modules()
        if any(i.startswith("transformers") for i in imported(path))
    }
    assert users == {"bench.transformers_peer"}


def run_smol_without(unwanted: set[str], arguments: list[str]) -> None:
    """Run a command and check that it has not imported some modules."""
    code = (
        "import sys; from smolcli.cli.main import app\n"
        f"sys.argv = ['smol', *{arguments!r}]\n"
        "try: app()\n"
        "except SystemExit as exc: assert not exc.code or '--check' in sys.argv, exc.code\n"
        f"loaded = {unwanted!r} & set(sys.modules)\n"
        "assert not loaded, f'imported {loaded}'\n"
    )
    root = PACKAGE.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["run", "--check", "sample_inputs/mixed.jsonl"]],
)
def test_light_commands_never_load_torch(arguments: list[str]) -> None:
    run_smol_without(TORCH | {"numpy"} if "--help" in arguments else TORCH, arguments)


def test_a_question_needs_few_libraries(tiny_folder: Path) -> None:
    """These libraries would more than double the time until the first token."""
    native_kernels("float32")
    unwanted = TORCH | {
        *("pydantic", "rich", "importlib.metadata", "asyncio", "multiprocessing", "ssl"),
        *("huggingface_hub.file_download", "httpx2", "llguidance", "gguf", "flask", "pyarrow"),
        *("psutil", "ml_dtypes", "secrets", "tomllib", "smolcli.data", "smolcli.batch.statistics"),
        *(f"smolcli.cli.commands.{name}" for name in ("run", "serve", "report", "bench")),
    }
    question = ["ask", "What is gravity?", "--max-new-tokens", "8", "--system", "Be brief."]
    run_smol_without(unwanted, [*question, "--model", str(tiny_folder), "--dtype", "float32"])


def test_answers_on_a_cpu_need_neither_torch_nor_transformers(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Every sampling setting, log probabilities and a grammar, too."""
    native_kernels("float32")
    queries: list[dict[str, object]] = [
        {},
        {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "repetition_penalty": 1.2},
        {"logprobs": True, "top_logprobs": 3},
        {"choices": ["yes", "no"]},
        {"n": 2, "temperature": 1.0, "stop": ["x"]},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        json.dumps({"chat_id": str(i), "user_prompt": "Hello?", "max_new_tokens": 8} | query)
        for i, query in enumerate(queries)
    ]
    source.write_text("\n".join(lines), "utf-8")
    model = ["--model", str(tiny_folder), "--dtype", "float32"]
    run_smol_without(TORCH, ["run", str(source), "-o", str(output), *model])
    results = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [result.get("error") for result in results] == [None] * len(queries)
