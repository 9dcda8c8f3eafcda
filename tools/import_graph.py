"""Counts modules, packages and the imports between packages: python -m tools.import_graph [FOLDER].

A package is a direct child of FOLDER (default: smolcli), which may be a single module. Imports
under TYPE_CHECKING do not count.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def imported(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports at run time."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def package_graph(folder: Path) -> dict[str, set[str]]:
    """Which packages each package imports."""
    graph: dict[str, set[str]] = defaultdict(set)
    for path in folder.rglob("*.py"):
        package = path.relative_to(folder).with_suffix("").parts[0]
        modules = (name.split(".") for name in imported(path))
        graph[package] |= {parts[1] for parts in modules if parts[0] == folder.name and parts[1:]}
    graph.pop("__init__", None)
    return {package: targets - {package} for package, targets in graph.items()}


def num_layers(graph: dict[str, set[str]]) -> int:
    """Length of the longest chain of imports.

    Raises:
        ValueError: packages import each other in a cycle.
    """
    visiting: set[str] = set()

    @cache
    def height(package: str) -> int:
        if package in visiting:
            raise ValueError(f"{package} is part of an import cycle")
        visiting.add(package)
        result = 1 + max((height(target) for target in graph.get(package, ())), default=0)
        visiting.discard(package)
        return result

    return max(height(package) for package in graph)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "smolcli")
    graph = package_graph(folder)
    modules = sum(path.name != "__init__.py" for path in folder.rglob("*.py"))
    imports = sum(len(targets) for targets in graph.values())
    sys.stdout.write(
        f"modules   {modules}\npackages  {len(graph)}\nlayers    {num_layers(graph)}\n"
        f"imports   {imports} between packages\n"
    )


if __name__ == "__main__":
    main()
