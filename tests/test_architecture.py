"""Imports between packages point down, and light commands stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    ["errors"],
    ["types"],
]
TORCH_ALLOWED = ("engine.torch_ops", "engine.native", "weights", "bench.peer")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def package(module: str) -> str:
    return module.partition(".")[0]


def layer(module: str) -> int:
    rows = [index for index, row in enumerate(LAYERS) if package(module) in row]
    assert rows, f"{package(module)} is in no layer: add it to LAYERS"
    return rows[0]


def imported(path: Path) -> Iterator[str]:
    """Names of imported modules, those for type checkers alone left out."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(("name", "path"), [m for m in modules() if m[0] != "__init__"])
def test_imports_point_down(name: str, path: Path) -> None:
    for module in imported(path):
        if module.startswith("smolcli."):
            other = module.removeprefix("smolcli.")
            same_package = package(name) == package(other)
            assert same_package or layer(other) > layer(name), f"{name} imports {other}"


def test_only_few_modules_import_torch() -> None:
    users = {name for name, path in modules() if any(i.startswith("torch") for i in imported(path))}
    assert {u for u in users if not u.startswith(TORCH_ALLOWED)} == set()


def test_only_conversion_and_the_benchmark_import_transformers() -> None:
    users = {
        name
        for name, path in modules()
        if any(i.startswith("transformers") for i in imported(path))
    }
    assert users == {"bench.peer"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["run", "--check", "sample_inputs/mixed.jsonl"]],
)
def test_light_commands_never_load_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from smolcli.cli.main import app\n"
        f"sys.argv = ['smol', *{arguments!r}]\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'loaded too much'\n"
    )
    root = PACKAGE.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)
