"""What is chosen for a machine: cores and memory by what a container leaves, slots by memory."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from smolcli.engine.autoconfig import resolve_config
from smolcli.engine.config import LlamaConfig
from smolcli.engine.hardware import memory_bytes, num_cores
from smolcli.errors import UsageError
from smolcli.settings import EngineSettings

GIB = 1 << 30
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, max_positions=8192, rms_norm_eps=1e-5, rope_theta=1e5,
    is_tied=True, eos_ids=frozenset({2}),
)  # fmt: skip
SMOLLM2_1_7B = LlamaConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_layers=24, num_heads=32,
    num_kv_heads=32, head_dim=64, max_positions=8192, rms_norm_eps=1e-5, rope_theta=1.3e5,
    is_tied=True, eos_ids=frozenset({2}),
)  # fmt: skip


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root folder with control groups as Linux shows them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def slots(config: LlamaConfig, memory: int, dtype: str = "bfloat16") -> int:
    return resolve_config(EngineSettings(dtype=dtype), config, memory).max_batch_size  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "meta"])
def test_another_device_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UsageError, match="none of auto, cpu, cuda"):
        resolve_config(EngineSettings(device=name), SMOLLM2_135M)


def test_auto_is_a_gpu_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_config(EngineSettings(device="auto"), SMOLLM2_135M).device.type == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"'cuda' cannot be used here: .*; auto takes"):
        resolve_config(EngineSettings(device="cuda"), SMOLLM2_135M)


def test_without_control_groups_the_whole_machine_counts(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert 1 <= num_cores(tmp_path) <= (os.cpu_count() or 1)


@pytest.mark.parametrize("group", ["proc/self/cgroup", "version 1"])
def test_memory_is_what_the_narrowest_group_has(tmp_path: Path, group: str) -> None:
    if group == "version 1":
        files = {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000000",
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "2000000",
        }
    else:
        files = {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/memory.max": "1000000",
            "sys/fs/cgroup/a/b/memory.max": "max",
        }
    assert memory_bytes(machine(tmp_path, files)) == 1_000_000


def test_in_a_container_the_path_may_be_the_hosts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n0::/docker/0123",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000",
    }
    assert memory_bytes(machine(tmp_path, files)) == 1_000_000


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("150000 100000", 1),
                                              ("20000 100000", 1)])  # fmt: skip
def test_a_quota_bounds_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    files = {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": quota}
    assert num_cores(machine(tmp_path, files)) == cores
    quota_us, period_us = quota.split()
    files = {
        "proc/self/cgroup": "3:cpu,cpuacct:/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota_us,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": period_us,
    }
    assert num_cores(machine(tmp_path / "1", files)) == cores


def test_no_quota_bounds_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n3:cpu:/", "sys/fs/cgroup/a/cpu.max": "max 100000",
             "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}  # fmt: skip
    assert num_cores(machine(tmp_path, files)) == num_cores(tmp_path / "nothing")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' affinity")
def test_affinity_bounds_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_slots_are_64_unless_memory_or_model_say_fewer() -> None:
    assert slots(SMOLLM2_135M, 24 * GIB) == slots(SMOLLM2_135M, 2 * GIB) == 64
    assert 8 <= slots(SMOLLM2_135M, 1 * GIB) < 64
    assert slots(SMOLLM2_135M, GIB // 2) == 1
    assert slots(SMOLLM2_135M, 5 * GIB // 4, "float32") < slots(SMOLLM2_135M, 5 * GIB // 4)
    assert 8 <= slots(SMOLLM2_1_7B, 8 * GIB) < 64
    assert slots(SMOLLM2_1_7B, 24 * GIB) == 64


@pytest.mark.parametrize("gib", [1, 2, 4, 8])
def test_what_is_chosen_fits(gib: int) -> None:
    chosen = resolve_config(EngineSettings(dtype="bfloat16"), SMOLLM2_135M, gib * GIB)
    assert chosen.needed_bytes <= gib * GIB


def test_what_is_given_is_taken() -> None:
    given = EngineSettings(dtype="float32", threads=3, max_batch_size=100, kv_cache_mb=7)
    chosen = resolve_config(given, SMOLLM2_135M, GIB)
    assert (chosen.threads, chosen.max_batch_size, chosen.kv_cache_bytes) == (3, 100, 7 << 20)
    assert chosen.dtype is torch.float32
    auto = resolve_config(EngineSettings(), SMOLLM2_135M)
    assert 1 <= auto.threads <= num_cores()
    assert auto.dtype in (torch.float32, torch.bfloat16)
