"""The checks of `smol doctor`: what a run needs, what is missing, and how to fix it."""

import os
import platform
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from smolcli.engine.hardware import cpu_features, memory_bytes, num_cores
from smolcli.errors import HubUnreachable, ModelError, SmolError, UsageError, error_reason
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.weights import hub
from smolcli.weights.resolve import on_disk
from smolcli.weights.store import ModelFiles, find_damage, models_folder

if TYPE_CHECKING:
    from smolcli.engine.autoconfig import ResolvedConfig

PACKAGE = "smolcli"
MIN_DISK_BYTES = 1 << 30  # a model and its converted copy
GPU_PACKAGES = ("torch", "transformers")  # the CPU needs them only for unusual models
OTHER_MODEL = "fix --model, SMOL_MODEL or model in the config file"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Args:
        name: the check's name.
        detail: what was found.
        remedy: how to fix a problem; None if there is none.
        is_fatal: whether the problem prevents every run.
    """

    name: str
    detail: str
    remedy: str | None = None
    is_fatal: bool = False

    @property
    def status(self) -> str:
        """ok, note or bad."""
        if self.remedy is None:
            return "ok"
        return "bad" if self.is_fatal else "note"


def examine(settings: EngineSettings, config: Path | None) -> Iterator[Finding]:
    """Check everything that a run with these settings needs or can use.

    Args:
        settings: the run's engine settings.
        config: path of the config file, if any.
    """
    yield Finding(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    yield required_packages(_requirements())
    yield Finding("config", str(config) if config else "no config file")
    machine = [f"cores: {num_cores()}", f"memory: {_gib(memory_bytes())}", *cpu_features()]
    yield Finding("machine", ", ".join(machine))
    yield from _torch()
    yield _disk()
    yield from _model(settings)
    yield from _extras()


def required_packages(requirements: Iterable[str]) -> Finding:
    """Whether packages are installed in supported versions; those for GPUs may be missing.

    Args:
        requirements: as in a package's metadata. Those with a marker are ignored.
    """
    from packaging.requirements import Requirement

    problems, unmet = [], []
    for requirement in map(Requirement, requirements):
        found = _version(requirement.name)
        if requirement.marker or (found is None and requirement.name in GPU_PACKAGES):
            continue  # the torch check reports the latter
        if found is None:
            problems.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} does not satisfy {requirement.specifier}")
        else:
            continue
        unmet.append(str(requirement))
    if problems:
        return Finding("packages", "; ".join(problems), _install(unmet), is_fatal=True)
    return Finding(
        "packages", f"smol {_version(PACKAGE) or '(not installed)'}; all requirements are satisfied"
    )


def _install(requirements: Iterable[str]) -> str:
    """The command that installs packages, in a source checkout as well as in a container."""
    return f"pip install {' '.join(map(shlex.quote, requirements))}"


def _torch() -> Iterator[Finding]:
    if _version("torch") is None:
        remedy = f"only needed for GPUs and unusual models: {_install(GPU_PACKAGES)}"
        yield Finding("torch", "not installed", remedy)
        return
    try:
        from smolcli.engine.autoconfig import gpus

        names = ", ".join(gpus())
    except (ImportError, OSError) as exc:
        remedy = "pip install --force-reinstall torch"
        yield Finding("torch", f"cannot be imported: {exc}", remedy, is_fatal=True)
        return
    yield Finding("torch", f"{_version('torch')}")
    yield Finding("gpu", names or "no GPU that torch can use")


def _disk() -> Finding:
    try:
        folder = models_folder()
    except UsageError as exc:  # the user has no home directory
        fault, _, advice = str(exc).partition("; ")
        return Finding("disk", fault, advice, is_fatal=True)
    place = _from_home(folder)
    while not os.path.exists(folder):
        folder = folder.parent
    if not os.access(folder, os.X_OK):  # such as the home directory of another user
        own = "set SMOL_HOME to a directory of your own"
        return Finding("disk", f"{place} cannot be read", own, is_fatal=True)
    free = shutil.disk_usage(folder).free
    remedy = (
        None
        if free >= MIN_DISK_BYTES
        else "free some space, or set SMOL_HOME to a directory on another disk"
    )
    return Finding("disk", f"{_gib(free)} free at {place}", remedy)


def _from_home(path: Path) -> Path:
    """The path relative to `~` if it lies in the user's home directory."""
    home = os.path.expanduser("~")
    is_inside = home != os.sep and path.is_relative_to(home)
    return Path("~", path.relative_to(home)) if is_inside else path


def _model(settings: EngineSettings) -> Iterator[Finding]:
    """Check the model, its resolved config, and the Hub, which only a missing model needs."""
    model = settings.model
    try:
        if Path(model).suffix.lower() == ".gguf" and os.path.isfile(os.path.expanduser(model)):
            yield Finding("model", f"{model}; prepared on first use")
            return
        files = on_disk(model)
    except ModelError as exc:
        yield Finding("model", str(exc), OTHER_MODEL, is_fatal=True)
        return
    fault = _hub_fault(model if files is None else DEFAULT_MODEL)
    if files is None:
        yield _missing(model, fault)
    else:
        yield _found(files)
        yield from _resolved(settings, files)
    if isinstance(fault, HubUnreachable):
        reason = error_reason(fault.__cause__ or fault).partition("\n")[0]
        remedy = "only needed to download models; set HF_ENDPOINT to use a mirror"
        yield Finding("hub", f"unreachable: {reason}", remedy)
    else:
        yield Finding("hub", "reachable")


def _missing(model: str, fault: ModelError | None) -> Finding:
    if fault is None:
        return Finding("model", f"{model} is on the Hub but not downloaded", f"smol pull {model}")
    if not isinstance(fault, HubUnreachable):
        return Finding("model", str(fault), OTHER_MODEL, is_fatal=True)
    remedy = (
        "smol pull"
        if model == DEFAULT_MODEL
        else f"run smol pull {model} where the Hub is reachable"
    )
    return Finding(
        "model", f"{model} is not downloaded, and the Hub is unreachable", remedy, is_fatal=True
    )


def _found(files: ModelFiles) -> Finding:
    if damage := find_damage(files.folder):
        is_ours = files.folder.is_relative_to(models_folder())
        again = f"smol models rm {files.model}; smol pull {files.model}"
        remedy = again if is_ours else f"replace {files.folder}"
        return Finding("model", f"{files.folder}: {damage}", remedy, is_fatal=True)
    revision = files.revision[:12]
    return Finding("model", f"{files.model}, verified; source {files.source}, revision {revision}")


def _resolved(settings: EngineSettings, files: ModelFiles) -> Iterator[Finding]:
    try:
        from smolcli.weights.loader import resolve_model_config

        config = resolve_model_config(settings, files.folder)
    except (ImportError, OSError):
        return  # reported by the torch check
    except SmolError as exc:
        yield Finding(
            "resolved", str(exc), "choose another --model, --device or --dtype", is_fatal=True
        )
        return
    yield Finding(
        "resolved",
        f"{config.dtype} on {config.device}, threads: {config.threads}, "
        f"batch size: {config.max_batch_size}, KV cache: up to {_gib(config.kv_cache_bytes)}",
    )
    yield _kernels(config)
    yield _memory(config)


def _kernels(config: "ResolvedConfig") -> Finding:
    if config.kernels is not None:
        detail = f"native, variant {config.kernels.name}, the best that this CPU supports"
        return Finding("kernels", detail)
    remedy = "reinstall smol with a C compiler or the ziglang package; native kernels are faster"
    return Finding(
        "kernels",
        f"torch: {config.unsupported_reason}",
        remedy if config.device == "cpu" else None,
    )


def _memory(config: "ResolvedConfig") -> Finding:
    needed, has = _gib(config.needed_bytes), _gib(config.memory_bytes)
    if config.needed_bytes > config.memory_bytes:
        remedy = "use a smaller --model or a machine with more memory"
        return Finding(
            "memory", f"needs about {needed}, but the device has {has}", remedy, is_fatal=True
        )
    if config.device != "cpu":
        return Finding("memory", f"needs about {needed} of {has}")
    available = psutil.virtual_memory().available
    remedy = "close other programs or lower --max-batch-size"
    detail = f"needs about {needed}; {_gib(available)} of {_gib(config.memory_bytes)} are free"
    return Finding("memory", detail, None if available > config.needed_bytes else remedy)


def _hub_fault(model: str) -> ModelError | None:
    """Why a model cannot be downloaded; None if it can."""
    try:
        hub.probe(model)
    except ModelError as exc:
        return exc
    return None


def _extras() -> Iterator[Finding]:
    """Report which optional packages are installed."""
    from packaging.requirements import Requirement

    extras = (
        set(metadata.metadata(PACKAGE).get_all("Provides-Extra") or []) if _is_installed() else ()
    )
    for extra in sorted(set(extras) - {"dev", "docs"}):
        wanted = [
            r for r in map(Requirement, _requirements()) if r.marker and extra in str(r.marker)
        ]
        missing = [r.name for r in wanted if _version(r.name) is None]
        found = ", ".join(f"{r.name} {_version(r.name)}" for r in wanted if r.name not in missing)
        remedy = f"optional: pip install 'smolcli[{extra}]'" if missing else None
        yield Finding(extra, found or "not installed", remedy)


def _is_installed() -> bool:
    return _version(PACKAGE) is not None


def _requirements() -> list[str]:
    return (metadata.requires(PACKAGE) or []) if _is_installed() else []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
