"""Put a model where smol looks for one."""

import json
import shutil
from pathlib import Path

MODEL = "tests/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def entries(home: Path) -> list[str]:
    """The store's directories, finished or not."""
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


def fill_store(home: Path, tiny_folder: Path, model: str = MODEL) -> Path:
    folder = home / "models" / model.replace("/", "--")
    shutil.copytree(tiny_folder, folder)
    record = {"model": model, "source": "pypi", "revision": "abc", "created_with": {}}
    (folder / "smol.json").write_text(json.dumps(record))
    return folder


def fill_cache(tmp_path: Path, tiny_folder: Path, model: str = MODEL) -> Path:
    cache = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_folder, cache / "snapshots" / COMMIT)
    return cache / "snapshots" / COMMIT
