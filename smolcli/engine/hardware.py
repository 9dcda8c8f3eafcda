"""What this process may use of the machine: cores and memory, by its control group too."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")


def num_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may keep busy, by its affinity and its group's quota.

    A quota is rounded down: threads beyond it would be stopped in the middle of a step, and the
    others would wait for them.
    """
    if hasattr(os, "sched_getaffinity"):
        num_usable = len(os.sched_getaffinity(0))
    else:
        num_usable = os.cpu_count() or 1
    num_physical = psutil.cpu_count(logical=False) or num_usable
    quotas = [_quota(group) for group in _groups(root, "cpu")]
    return max(1, int(min([num_usable, num_physical, *quotas])))


def memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process may have: the machine's, or its group's part of it."""
    limits = [_memory_limit(group) for group in _groups(root, "memory")]
    return int(min([psutil.virtual_memory().total, *limits]))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process' control group and those around it, in versions 1 and 2.

    In a container the path may be the host's; the limits are then those of the outermost folder.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _quota(group: Path) -> float:
    """Cores that a group may use at a time, infinite without a limit."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.strip().isdecimal() else float("inf")


def _memory_limit(group: Path) -> float:
    """Bytes that a group may have, infinite without a limit."""
    limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
    return int(limit) if limit.strip().isdecimal() else float("inf")


def _read(path: Path) -> str:
    """A file's text, "" where there is none."""
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
