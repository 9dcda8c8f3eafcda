"""Prints the requirements of an installation without the packages that only GPUs need.

    python tools/slim_requirements.py [EXTRA...] > requirements.txt
    pip install -c constraints.txt -r requirements.txt
    pip install --no-deps smolcli-*.whl

It reads pyproject.toml and uses only the standard library, so it runs before anything is installed.
"""

import re
import sys
import tomllib
from pathlib import Path

GPU_PACKAGES = {"torch", "transformers"}


def slim_requirements(project: Path, extras: list[str]) -> list[str]:
    """The requirements of smol on a CPU.

    Args:
        project: path of pyproject.toml.
        extras: optional dependencies to include.

    Raises:
        KeyError: there is no such extra.
    """
    table = tomllib.loads(project.read_text("utf-8"))["project"]
    optional = table["optional-dependencies"]
    wanted = [*table["dependencies"], *(line for name in extras for line in optional[name])]
    return [line for line in wanted if name_of(line) not in GPU_PACKAGES]


def name_of(requirement: str) -> str:
    """The name of the package in a requirement such as "torch>=2.8"."""
    return re.split(r"[^\w.-]", requirement.strip())[0].lower()


def main() -> None:
    project = Path(__file__).parent.parent / "pyproject.toml"
    extras = [name for argument in sys.argv[1:] for name in argument.split(",") if name]
    sys.stdout.write("".join(f"{line}\n" for line in slim_requirements(project, extras)))


if __name__ == "__main__":
    main()
