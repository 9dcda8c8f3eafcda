"""What the model store holds: listed, checked and removed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolcli.errors import ModelError, ModelNotFound
from smolcli.weights.store import (
    RECORD,
    ModelFiles,
    exclusively,
    missing_file,
    models_folder,
    sha256_of,
    stored,
)


@dataclass(frozen=True, slots=True)
class Item:
    """One folder of the store; `files` None: it is damaged."""

    name: str
    folder: Path
    files: ModelFiles | None
    num_bytes: int

    def facts(self) -> dict[str, Any]:
        """Name, size, source and revision; the last two None where it is damaged."""
        return {
            "name": self.name,
            "bytes": self.num_bytes,
            "source": self.files.source if self.files else None,
            "revision": self.files.revision if self.files else None,
        }


def items() -> Iterator[Item]:
    """Every model of the store, by name."""
    for folder in sorted(models_folder().glob("[!.]*")):
        name = str(record(folder).get("model") or folder.name)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield Item(name, folder, stored(name), num_bytes)


def find(name: str) -> Item:
    """The model that the store holds under a name.

    Raises:
        ModelNotFound: naming those that it holds.
    """
    held = list(items())
    for item in held:
        if name in (item.name, item.folder.name):
            return item
    names = ", ".join(item.name for item in held) or "none"
    raise ModelNotFound(f"the store has no model {name!r}; it holds: {names}")


def remove(item: Item) -> None:
    """Delete a model from the store, once nobody puts it there any more."""
    with exclusively(item.name) as scratch:
        item.folder.rename(scratch / "removed")


def record(folder: Path) -> dict[str, Any]:
    """What was written down of a model when it was put into the store."""
    try:
        values = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def fault(folder: Path) -> str | None:
    """What is wrong with a model's files, None if they are whole.

    In the store they must be those that were put there, size and sha256; elsewhere, weights of
    the size that their header tells.
    """
    if missing := missing_file(folder):
        return f"{missing} is missing"
    for name, digest in record(folder).get("sha256", {}).items():
        try:
            if sha256_of(folder / name) != digest:
                return f"{name} is not what was put there: its sha256 differs"
        except ModelError as exc:
            return str(exc)
    return next(filter(None, map(_weights_fault, sorted(folder.glob("*.safetensors")))), None)


def _weights_fault(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as exc:
        return f"{path.name} is damaged: {exc}"


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a model."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
