"""The resolved config: cores and memory within a container's limits, batch size by memory."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest
import torch

from smolcli.engine.autoconfig import resolve_config
from smolcli.engine.config import LlamaConfig
from smolcli.engine.hardware import cpu_features, memory_bytes, num_cores
from smolcli.engine.native.bindings import load_kernels
from smolcli.errors import ModelError, UsageError
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


def test_weights_stored_in_bfloat16_stay_so_for_float32_products() -> None:
    """They are the same products, from half the memory."""
    given = EngineSettings(dtype="float32")
    expanded = resolve_config(given, SMOLLM2_135M).kernels
    compact = resolve_config(given, SMOLLM2_135M, formats={"embed": "bfloat16"}).kernels
    if expanded is None or compact is None:
        pytest.skip("no native kernels for this machine")
    assert compact.dtype == expanded.dtype == np.float32
    assert expanded.weight_dtype == np.float32
    if load_kernels("bfloat16").dtype == np.float32:  # no bfloat16 products on this CPU
        assert compact.weight_dtype == ml_dtypes.bfloat16


def slots(config: LlamaConfig, memory: int, dtype: str = "bfloat16") -> int:
    return resolve_config(EngineSettings(dtype=dtype), config, memory).max_batch_size  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "meta"])
def test_an_unknown_device_is_rejected_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        resolve_config(EngineSettings(device=name), SMOLLM2_135M)


def test_auto_is_the_cpu() -> None:
    """A GPU has to be requested: looking for one would load torch at every start."""
    assert resolve_config(EngineSettings(device="auto"), SMOLLM2_135M).device == "cpu"


def test_the_local_backend_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "import smolcli.backends.local, smolcli.engine.engine\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_rejected_with_the_alternative() -> None:
    with pytest.raises(UsageError, match=r"'cuda' is not available: .*; use --device cpu"):
        resolve_config(EngineSettings(device="cuda"), SMOLLM2_135M)


def test_cuda_without_torch_is_rejected_with_the_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An installation for CPUs, such as the container image, leaves torch out."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "smolcli.engine.torch_ops.devices", raising=False)
    with pytest.raises(UsageError, match=r"'cuda' needs torch, which is not installed; .* cpu"):
        resolve_config(EngineSettings(device="cuda"), SMOLLM2_135M)


def test_without_control_groups_the_whole_machine_is_available(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert 1 <= num_cores(tmp_path) <= (os.cpu_count() or 1)


@pytest.mark.parametrize("group", ["proc/self/cgroup", "version 1"])
def test_memory_is_the_lowest_limit_of_all_groups(tmp_path: Path, group: str) -> None:
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


def test_a_container_may_see_the_path_of_the_host(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n0::/docker/0123",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000",
    }
    assert memory_bytes(machine(tmp_path, files)) == 1_000_000


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("150000 100000", 1),
                                              ("20000 100000", 1)])  # fmt: skip
def test_a_quota_limits_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    files = {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": quota}
    assert num_cores(machine(tmp_path, files)) == cores
    quota_us, period_us = quota.split()
    files = {
        "proc/self/cgroup": "3:cpu,cpuacct:/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota_us,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": period_us,
    }
    assert num_cores(machine(tmp_path / "1", files)) == cores


def test_an_unlimited_quota_limits_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n3:cpu:/", "sys/fs/cgroup/a/cpu.max": "max 100000",
             "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}  # fmt: skip
    assert num_cores(machine(tmp_path, files)) == num_cores(tmp_path / "nothing")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' affinity")
def test_affinity_limits_the_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux' affinity")
def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    """Kubernetes pins containers to both hyperthreads of their cores."""
    folder = "sys/devices/system/cpu"
    files = {f"{folder}/cpu{cpu}/topology/core_cpus_list": "0-1" for cpu in os.sched_getaffinity(0)}
    files[f"{folder}/cpu9999/topology/core_cpus_list"] = "9999"
    assert num_cores(machine(tmp_path, files)) == 1


def test_the_batch_size_is_64_unless_memory_is_short() -> None:
    assert slots(SMOLLM2_135M, 24 * GIB) == slots(SMOLLM2_135M, 4 * GIB) == 64
    assert 8 <= slots(SMOLLM2_135M, 1 * GIB) < 64
    assert slots(SMOLLM2_135M, GIB // 2) == 1
    assert slots(SMOLLM2_135M, 5 * GIB // 4, "float32") <= slots(SMOLLM2_135M, 5 * GIB // 4)
    assert 8 <= slots(SMOLLM2_1_7B, 8 * GIB) < 64
    assert slots(SMOLLM2_1_7B, 32 * GIB) == 64


@pytest.mark.parametrize("gib", [1, 2, 4, 8])
def test_the_resolved_config_fits_into_memory(gib: int) -> None:
    chosen = resolve_config(EngineSettings(dtype="bfloat16"), SMOLLM2_135M, gib * GIB)
    assert chosen.needed_bytes <= gib * GIB


def test_explicit_settings_are_kept() -> None:
    given = EngineSettings(dtype="float32", threads=3, max_batch_size=100, kv_cache_mb=7)
    chosen = resolve_config(given, SMOLLM2_135M, GIB)
    assert (chosen.threads, chosen.max_batch_size, chosen.kv_cache_bytes) == (3, 100, 7 << 20)
    assert chosen.dtype == "float32"
    auto = resolve_config(EngineSettings(), SMOLLM2_135M)
    assert auto.speculates == (auto.kernels is not None)
    assert not resolve_config(EngineSettings(speculation=False), SMOLLM2_135M).speculates
    assert 1 <= auto.threads <= num_cores()
    assert auto.dtype in ("float32", "bfloat16")


def test_a_kv_cache_without_room_for_a_query_is_rejected() -> None:
    """Every line failed as too long for a "maximum context length" of 0 tokens."""
    least = EngineSettings(dtype="float32", kv_cache_mb=3)
    assert resolve_config(least, SMOLLM2_135M, GIB).kv_cache_bytes == 3 << 20
    with pytest.raises(
        UsageError, match="--kv-cache-mb 2 is too small for this model: 64 tokens need 3 MiB"
    ):
        resolve_config(replace(least, kv_cache_mb=2), SMOLLM2_135M, GIB)


@pytest.mark.parametrize(
    ("setting", "memory", "num_bytes"),
    [(None, GIB, GIB // 32), (None, 64 * GIB, 256 << 20), (0, 64 * GIB, 0), (7, GIB, 7 << 20)],
)
def test_the_prefix_cache_grows_with_memory(
    setting: int | None, memory: int, num_bytes: int
) -> None:
    given = EngineSettings(dtype="float32", prefix_cache_mb=setting)
    assert resolve_config(given, SMOLLM2_135M, memory).prefix_cache_bytes == num_bytes


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", ["AVX2", "AVX-512", "bfloat16"]),
        ("flags : avx2 avx_vnni", ["AVX2", "VNNI"]),
        ("Features : asimd bf16", ["bfloat16", "NEON"]),
        ("", []),
    ],
)
def test_cpu_features_are_read_from_cpuinfo(tmp_path: Path, text: str, features: list[str]) -> None:
    assert sorted(cpu_features(machine(tmp_path, {"proc/cpuinfo": text}))) == sorted(features)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size must be an integer from 1 to 131072, not 0"),
        ("head_dim", "64", "head_dim must be an integer"),
        ("num_layers", True, "num_hidden_layers must be an integer"),
        ("intermediate_size", 1536.0, "intermediate_size must be an integer"),
        ("max_positions", 10**12, "max_position_embeddings must be an integer"),
        ("num_kv_heads", 4, "num_attention_heads 9 is not a multiple of num_key_value_heads 4"),
        ("head_dim", 63, "head_dim 63 is odd"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps must be positive, not nan"),
        ("rope_theta", -1.0, "rope_theta must be positive"),
        ("is_tied", "yes", "tie_word_embeddings must be true or false"),
        ("eos_ids", frozenset({2, 49152}), "eos_token_id must be token ids from 0 to 49151"),
        ("eos_ids", frozenset({"2"}), "eos_token_id must be token ids"),
    ],
)
def test_a_config_that_no_model_can_have_is_rejected(field: str, value: Any, message: str) -> None:
    """Such values once ended in a segmentation fault or garbage output."""
    with pytest.raises(ModelError, match=re.escape(message)):
        replace(SMOLLM2_135M, **{field: value})
