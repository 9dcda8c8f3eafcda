"""Chooses device, dtype, kernels, threads, batch size and cache sizes for this machine.

torch is imported only if the device is a GPU. `auto` is the CPU: GPUs have to be requested, because
looking for one would load torch at every start.
"""

import re
from dataclasses import dataclass
from math import ceil
from typing import Literal

from smolcli.engine.config import LlamaConfig
from smolcli.engine.hardware import cpu_features, memory_bytes, num_cores
from smolcli.engine.native.bindings import KernelError, Kernels, load_kernels
from smolcli.engine.native.model import unsupported_reason
from smolcli.engine.native.packing import NOT_QUANTIZED, packed_layout
from smolcli.engine.quantized import Formats
from smolcli.errors import UsageError
from smolcli.settings import MAX_AUTO_SLOTS, Dtype, EngineSettings, ResolvedDtype

FloatDtype = Literal["float32", "bfloat16"]

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
KV_CACHE_DIVISOR = 4  # the KV cache may take 1/4 of the memory
PREFIX_CACHE_DIVISOR = 32  # the prefix cache may take 1/32 of it,
MAX_PREFIX_CACHE_BYTES = 256 << 20  # but no more than this
OVERHEAD_BYTES = 320 << 20  # measured: the process and the activations of a step
MIN_TOKENS = 64  # length of the shortest useful query, which the KV cache must hold
TYPICAL_TOKENS = 256  # length of a typical query and its answer, for which each slot has memory


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Where and how an engine computes, with every setting resolved.

    Args:
        device: cpu, cuda or cuda:N.
        dtype: the dtype to compute in.
        kernels: the native kernels; None if torch computes: on a GPU, or if the kernels cannot run
            the model on this CPU.
        unsupported_reason: why `kernels` is None; "" if it is not.
        threads: number of CPU threads.
        max_batch_size: maximum number of sequences that run at once.
        speculates: whether to draft tokens; only with native kernels, which are batch-invariant,
            so that drafts leave answers unchanged.
        kv_cache_bytes: memory for the keys and values of running sequences.
        prefix_cache_bytes: memory for the prefix cache.
        memory_bytes: the device's memory.
        needed_bytes: estimate of what the engine occupies when every slot is in use.
        formats: dtype or quantized format of each of the checkpoint's matrices, if known.
    """

    device: str
    dtype: ResolvedDtype
    kernels: Kernels | None
    unsupported_reason: str
    threads: int
    max_batch_size: int
    speculates: bool
    kv_cache_bytes: int
    prefix_cache_bytes: int
    memory_bytes: int
    needed_bytes: int
    formats: Formats


def resolve_config(
    settings: EngineSettings,
    config: LlamaConfig,
    memory: int | None = None,
    *,
    formats: Formats = NOT_QUANTIZED,
) -> ResolvedConfig:
    """Fill in everything that the settings leave open.

    The batch size is the largest that increases throughput and fits into memory, assuming queries
    of typical length.

    Args:
        settings: what the user chose.
        config: the model's shape.
        memory: bytes of memory; by default the device's.
        formats: dtypes or quantized formats of the checkpoint's matrices, if known.

    Raises:
        UsageError: the device is not available, int8 products are not for this device or model, or
            the KV cache is too small for any query.
    """
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    kernels, reason = _kernels(config, dtype, device, formats)
    if dtype == "int8" and not kernels:
        raise UsageError(f"dtype int8 is not available: {reason}; use another --dtype")
    memory = memory or _memory_bytes(device)
    prefix_cache_bytes = _prefix_cache_bytes(settings, memory)
    if kernels:
        weight_bytes = packed_layout(config, kernels, formats).num_bytes
    else:
        weight_bytes = config.num_weights * ITEM_BYTES[dtype]
    taken = OVERHEAD_BYTES + weight_bytes + prefix_cache_bytes
    item_bytes = kernels.cache_dtype.itemsize if kernels else ITEM_BYTES[dtype]
    slot_bytes = config.kv_cache_bytes(TYPICAL_TOKENS, item_bytes)
    room = max(min(memory // KV_CACHE_DIVISOR, memory - taken), slot_bytes)
    kv_cache_bytes = settings.kv_cache_mb << 20 or room
    if kv_cache_bytes < (least := config.kv_cache_bytes(MIN_TOKENS, item_bytes)):
        raise UsageError(
            f"--kv-cache-mb {settings.kv_cache_mb} is too small for this model: "
            f"{MIN_TOKENS} tokens need {ceil(least / 2**20)} MiB"
        )
    num_slots = max(1, min(MAX_AUTO_SLOTS, kv_cache_bytes // slot_bytes))
    max_batch_size = settings.max_batch_size or num_slots
    return ResolvedConfig(
        device=device,
        dtype=dtype,
        kernels=kernels,
        unsupported_reason=reason,
        threads=settings.threads or num_cores(),
        max_batch_size=max_batch_size,
        speculates=settings.speculation and kernels is not None,
        kv_cache_bytes=kv_cache_bytes,
        prefix_cache_bytes=prefix_cache_bytes,
        memory_bytes=memory,
        needed_bytes=taken + min(max_batch_size * slot_bytes, kv_cache_bytes),
        formats=formats,
    )


def resolve_dtype(settings: EngineSettings) -> ResolvedDtype:
    """The dtype that the settings select on this machine.

    Raises:
        UsageError: the device is not available.
    """
    return _dtype(settings.dtype, _device(settings.device))


def gpus() -> list[str]:
    """The names of the GPUs that torch can use; imports torch."""
    from smolcli.engine.torch_ops.devices import gpu_names

    return gpu_names()


def _device(name: str) -> str:
    if name in ("auto", "cpu"):
        return "cpu"
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UsageError(
            f"unknown device {name!r}: expected auto, cpu, cuda, or cuda:N for one of several GPUs"
        )
    try:
        from smolcli.engine.torch_ops.devices import check_device

        check_device(name)
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"device {name!r} needs torch, which is not installed; install it, or use --device cpu"
        ) from exc
    except RuntimeError as exc:
        raise UsageError(f"device {name!r} is not available: {exc}; use --device cpu") from exc
    return name


def _dtype(name: Dtype, device: str) -> ResolvedDtype:
    return _float_dtype(device) if name == "auto" else name


def _float_dtype(device: str) -> FloatDtype:
    """The fastest dtype of a device that is as exact as bfloat16 weights."""
    if device == "cpu":
        return "bfloat16" if {"bfloat16", "AMX"} & set(cpu_features()) else "float32"
    from smolcli.engine.torch_ops.devices import has_bfloat16

    return "bfloat16" if has_bfloat16(device) else "float32"


def _kernels(
    config: LlamaConfig, dtype: ResolvedDtype, device: str, formats: Formats
) -> tuple[Kernels | None, str]:
    """The native kernels, or None and the reason why torch is used instead.

    float32 products of weights that are stored in bfloat16 are the same whether the weights are
    expanded beforehand or in registers; the latter reads half as much memory. What int8 does not
    compute in integers, it computes in the CPU's fastest dtype.
    """
    if device != "cpu":
        return None, "the device is a GPU"
    try:
        if dtype == "int8":
            kernels = load_kernels(_float_dtype(device), has_integer_products=True)
        else:
            kernels = load_kernels(dtype)
        if dtype == "float32" and set(formats.values()) == {"bfloat16"}:
            compact = load_kernels("bfloat16")
            kernels = compact if compact.dtype == kernels.dtype else kernels
    except KernelError as exc:
        return None, str(exc)
    reason = unsupported_reason(config, kernels)
    return (None, reason) if reason else (kernels, "")


def _prefix_cache_bytes(settings: EngineSettings, memory: int) -> int:
    if settings.prefix_cache_mb is not None:
        return settings.prefix_cache_mb << 20
    return min(memory // PREFIX_CACHE_DIVISOR, MAX_PREFIX_CACHE_BYTES)


def _memory_bytes(device: str) -> int:
    if device == "cpu":
        return memory_bytes()
    from smolcli.engine.torch_ops.devices import memory_bytes as gpu_memory_bytes

    return gpu_memory_bytes(device)
