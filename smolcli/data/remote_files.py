"""Files elsewhere, at URLs that fsspec knows: fetched before the work, put there after it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolcli.errors import InputError, RunError, SmolError, UsageError


def here(name: str) -> Path:
    """A path for a path, or for the URL of a file; of one elsewhere, its name in this folder.

    Raises:
        UsageError: for a URL that names no file, or no place that is known.
    """
    if "://" not in name:
        return Path(name)
    files, path = _located(name)
    if _is_here(files):
        return Path(path)
    if not Path(path).name or name.endswith("/"):
        raise UsageError(f"{name} is no file's URL: give one like s3://bucket/folder/file.jsonl")
    return Path(Path(path).name)


def is_elsewhere(name: str) -> bool:
    """Whether that is the URL of a file of another machine."""
    return "://" in name and not _is_here(_located(name)[0])


@contextmanager
def fetched(name: str) -> Iterator[Path]:
    """The file itself, or a copy of one elsewhere, which is gone afterwards.

    Raises:
        InputError: where it cannot be had.
    """
    if not is_elsewhere(name):
        yield here(name)
        return
    files, path = _located(name)
    with tempfile.TemporaryDirectory(prefix="smol-") as folder:
        copy = Path(folder, here(name).name)
        with _translated(InputError, f"cannot read {name}"):
            if not files.isfile(path):
                raise FileNotFoundError("there is no such file")
            files.get_file(path, str(copy))
        yield copy


def refuse_foreign(url: str, output: Path) -> None:
    """See that nothing is written over at a URL that no output here was put to.

    Raises:
        UsageError: where something is there, and no output here.
        RunError: where that cannot be seen.
    """
    files, path = _located(url)
    with _translated(RunError, f"cannot write {url}"):
        is_foreign = not output.exists() and files.exists(path)
    if is_foreign:
        raise UsageError(f"{url} exists; give another --output, or --overwrite to replace it")


def put(output: Path, url: str) -> None:
    """Copy a finished output to a URL, whole.

    Raises:
        RunError: where that fails; the output is still here.
    """
    files, path = _located(url)
    failed = f"cannot write {url}, and the same command tries again from {output}"
    with _translated(RunError, failed):
        files.put_file(str(output), path)


def _located(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except ImportError as exc:
        raise UsageError(f"cannot use {url}: {exc}") from exc
    except Exception as exc:  # each file system has its own: unknown names, missing credentials
        raise UsageError(f"cannot use {url}: {_reason(exc)}") from exc
    return files, path


def _is_here(files: Any) -> bool:
    return "file" in files.protocol


@contextmanager
def _translated(kind: type[SmolError], what: str) -> Iterator[None]:
    """Whatever a file system raises, as an error of ours; each has exceptions of its own."""
    try:
        yield
    except Exception as exc:
        raise kind(f"{what}: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
