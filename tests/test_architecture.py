"""The shape of the house: imports point down, and what must stay light stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "smolcli"
LAYERS = [  # from the doors down; a module imports only from rows below its own, or its own package
    ["__main__"],
    ["cli"],
    ["commands"],
    ["server", "run", "check", "talk", "report_page", "doctor", "bench"],
    ["work"],
    ["options", "display", "terminal"],
    ["journal"],
    ["queries", "conversation", "report", "manifest", "pipeline"],
    ["survey"],
    ["tables"],
    ["jsonl", "storage"],
    ["backends.open"],
    ["backends"],
    ["models"],
    ["engine", "chat", "vocabulary"],
    ["line_formats"],
    ["batch_format"],
    ["openai_wire"],
    ["schema"],
    ["query_fields"],
    ["formats"],
    ["settings", "machine"],
    ["errors"],
    ["records"],
]
TORCH_ALLOWED = ("engine", "models", "backends.open", "bench.peer")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def layer(name: str) -> int:
    """The row of a module; the longest matching name counts."""
    rows = [
        (len(entry), index)
        for index, row in enumerate(LAYERS)
        for entry in row
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert rows, f"{name} has no place in the house: give it one in LAYERS"
    return max(rows)[1]


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
            same_package = name.partition(".")[0] == other.partition(".")[0]
            assert same_package or layer(other) > layer(name), f"{name} imports {other}"


def test_only_few_modules_import_torch() -> None:
    users = {name for name, path in modules() if any(i.startswith("torch") for i in imported(path))}
    assert {u for u in users if not u.startswith(TORCH_ALLOWED)} == set()
    assert not {"engine.scheduler", "engine.sequence"} & users


def test_only_conversion_and_the_benchmark_import_transformers() -> None:
    users = {
        name
        for name, path in modules()
        if any(i.startswith("transformers") for i in imported(path))
    }
    assert users == {"models.convert", "bench.peer"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["run", "--check", "sample_inputs/mixed.jsonl"]],
)
def test_light_commands_never_load_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from smolcli.cli import app\n"
        f"sys.argv = ['smol', *{arguments!r}]\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'loaded too much'\n"
    )
    root = PACKAGE.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)


def test_files_and_functions_stay_small() -> None:
    """A file fits a head, a function a screen."""
    for name, path in modules():
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 300, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno
                assert length <= 45, f"{name}.{node.name} has {length} lines"
