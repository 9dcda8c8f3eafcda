"""Remote files, through fsspec: downloaded before a run and uploaded after it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolcli.errors import InputError, RunError, SmolError, UsageError, error_reason


def local_path(name: str) -> Path:
    """The local path of a path or URL; for a remote file, its name in the current folder.

    Raises:
        UsageError: the URL names no file, or a file system that is not available.
    """
    if "://" not in name:
        return Path(name)
    files, path = _resolve(name)
    if _is_local(files):
        return Path(path)
    if not Path(path).name or name.endswith("/"):
        raise UsageError(f"{name} does not name a file; expected s3://bucket/folder/file.jsonl")
    return Path(Path(path).name)


def is_remote(name: str) -> bool:
    """Whether a path or URL names a file on another machine."""
    return "://" in name and not _is_local(_resolve(name)[0])


def matching(url: str) -> list[str]:
    """The URLs of the files that match a pattern such as `hf://datasets/me/x/*.parquet`, sorted.

    Raises:
        InputError: the files cannot be listed.
    """
    files, path = _resolve(url)
    with _translated(InputError, f"cannot list {url}", url):
        return sorted(files.unstrip_protocol(found) for found in files.glob(path))


@contextmanager
def downloaded(name: str) -> Iterator[Path]:
    """Yield the path of a local file, or of a temporary copy of a remote one.

    Raises:
        InputError: the file cannot be downloaded.
    """
    if not is_remote(name):
        yield local_path(name)
        return
    files, path = _resolve(name)
    with tempfile.TemporaryDirectory(prefix="smol-") as folder:
        copy = Path(folder, local_path(name).name)
        with _translated(InputError, f"cannot read {name}", name):
            if not files.isfile(path):
                raise FileNotFoundError("no such file")
            files.get_file(path, str(copy))
        yield copy


def reject_overwrite(url: str, output: Path) -> None:
    """Check that uploading would replace nothing but an earlier upload of the same output.

    Args:
        url: where the output will be uploaded to.
        output: the local output; it exists if an earlier run wrote it.

    Raises:
        UsageError: there is a file at the URL, but no local output.
        RunError: the URL cannot be accessed.
    """
    files, path = _resolve(url)
    with _translated(RunError, f"cannot write {url}"):
        is_foreign = not output.exists() and files.exists(path)
    if is_foreign:
        raise UsageError(f"{url} exists; choose another --output, or replace it with --overwrite")


def upload(output: Path, url: str) -> None:
    """Copy a finished output to a URL.

    Raises:
        RunError: the upload fails; the local output stays.
    """
    files, path = _resolve(url)
    failed = f"cannot write {url}; the same command uploads {output} again"
    with _translated(RunError, failed):
        files.put_file(str(output), path)


def _resolve(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except ImportError as exc:
        reason = str(exc)
        if url.startswith(("http://", "https://")):
            reason = "this needs aiohttp: pip install aiohttp; or download the file first"
        raise UsageError(f"cannot use {url}: {reason}") from exc
    except Exception as exc:  # each file system raises exceptions of its own
        raise UsageError(f"cannot use {url}: {error_reason(exc)}") from exc
    return files, path


def _is_local(files: Any) -> bool:
    return "file" in files.protocol


@contextmanager
def _translated(kind: type[SmolError], what: str, url: str = "") -> Iterator[None]:
    """Turn whatever a file system raises into one of our errors.

    Args:
        kind: the error to raise.
        what: what could not be done.
        url: what it concerns, for errors that the Hugging Face Hub explains badly.
    """
    try:
        yield
    except Exception as exc:
        reason = _hub_reason(exc) if url.startswith("hf://") else error_reason(exc)
        raise kind(f"{what}: {reason}") from exc


def _hub_reason(exc: Exception) -> str:
    """Why the Hugging Face Hub did not deliver a file, and what to do."""
    import httpx2

    if isinstance(exc, httpx2.TransportError):
        return (
            f"the Hugging Face Hub cannot be reached ({exc}); check the network, or download the "
            "file elsewhere and pass its path"
        )
    if isinstance(exc, FileNotFoundError):
        return (
            "no such file; private and gated data sets need the environment variable HF_TOKEN, and "
            "HF_HUB_OFFLINE must not be set"
        )
    return error_reason(exc)
