"""The resources that this process may use: cores, memory and CPU features."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
CPU_FEATURES = {  # flags of /proc/cpuinfo, on x86 and ARM
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "bfloat16",
    "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "bf16": "bfloat16",
}


def num_cores(root: Path = ROOT) -> int:
    """The number of physical cores that CPU affinity and the control group's quota allow.

    A fractional quota is rounded down: the kernel would suspend a thread beyond it in the middle of
    a step, and the others would wait for it.

    Args:
        root: the root of the file system, for tests.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
    else:
        usable = set(range(os.cpu_count() or 1))
    num_physical = _num_physical_cores(root, usable) or len(usable)
    quotas = [_quota(group) for group in _groups(root, "cpu")]
    return max(1, int(min([len(usable), num_physical, *quotas])))


def memory_bytes(root: Path = ROOT) -> int:
    """The machine's memory, or the control group's limit if that is lower.

    Args:
        root: the root of the file system, for tests.
    """
    limits = [_memory_limit(group) for group in _groups(root, "memory")]
    return int(min([_physical_memory(), *limits]))


def cpu_features(root: Path = ROOT) -> list[str]:
    """Names of the CPU's instruction sets that matter for speed; empty if unknown (not Linux).

    Args:
        root: the root of the file system, for tests.
    """
    lines = _read(root / "proc/cpuinfo").splitlines()
    flags = {
        flag
        for line in lines
        if line.startswith(("flags", "Features"))
        for flag in line.partition(":")[2].split()
    }
    return list(dict.fromkeys(name for flag, name in CPU_FEATURES.items() if flag in flags))


def _num_physical_cores(root: Path, usable: set[int]) -> int:
    """The number of cores that usable logical CPUs belong to, or of all cores; 0 if unknown."""
    folder = root / "sys/devices/system/cpu"
    cores = {_read(folder / f"cpu{cpu}/topology/core_cpus_list") for cpu in usable} - {""}
    if cores:
        return len(cores)
    import psutil  # late: takes long to import

    return psutil.cpu_count(logical=False) or 0


def _physical_memory() -> int:
    """The machine's memory in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX, or not known by this name
        import psutil  # late: takes long to import

        return int(psutil.virtual_memory().total)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process's control group and its ancestors, in cgroup versions 1 and 2.

    Inside a container the path may be the host's; then the limits of the outermost folder apply.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _quota(group: Path) -> float:
    """The number of cores that a group may use at a time; infinite if unlimited."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.strip().isdecimal() else float("inf")


def _memory_limit(group: Path) -> float:
    """The number of bytes that a group may use; infinite if unlimited."""
    limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
    return int(limit) if limit.strip().isdecimal() else float("inf")


def _read(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
