"""A model on its way to a machine that does not have it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from smolcli.weights.store import ModelFiles, exclusively, install, stored

NEEDED = ("*.json", "*.jinja", "*.safetensors")


def pack(files: ModelFiles) -> list[Path]:
    """The files that another machine needs of a model."""
    return [path for pattern in NEEDED for path in sorted(files.folder.glob(pattern))]


def unpack(files: ModelFiles, contents: Mapping[str, bytes]) -> ModelFiles:
    """The model in this machine's store, put there from the contents of its files, once."""
    name = _name(files)
    with exclusively(name) as scratch:
        found = stored(name) or _build(replace(files, model=name), contents, scratch)
    return replace(files, folder=found.folder)


def unpacked(files: ModelFiles) -> ModelFiles | None:
    """The model as it was put here earlier; None if it never was."""
    found = stored(_name(files))
    return replace(files, folder=found.folder) if found else None


def _name(files: ModelFiles) -> str:
    return f"shipped--{files.revision}"


def _build(files: ModelFiles, contents: Mapping[str, bytes], scratch: Path) -> ModelFiles:
    folder = scratch / "model"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return install(replace(files, folder=folder), {}, scratch)
