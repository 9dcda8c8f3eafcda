"""What suits this machine: device, dtype, threads, slots and memory for keys and values."""

import re
from dataclasses import dataclass

import torch

from smolcli.engine.config import LlamaConfig
from smolcli.engine.hardware import memory_bytes, num_cores
from smolcli.engine.native.bindings import KernelError, Kernels, load_kernels
from smolcli.engine.native.model import unsupported_reason
from smolcli.errors import UsageError
from smolcli.settings import MOST_SLOTS, EngineSettings

CACHE_SHARE = 4  # keys and values may take this part of the memory
OVERHEAD_BYTES = 640 << 20  # measured: torch, the program and one step's intermediate values
TYPICAL_TOKENS = 256  # of a query and its answer: a slot that has no room for them is of no use


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Where and how an engine computes; nothing is left to be chosen."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels | None  # None: torch's
    unsupported_reason: str  # why they are torch's
    threads: int
    max_batch_size: int
    kv_cache_bytes: int
    memory_bytes: int  # of the device
    needed_bytes: int  # with every slot in use, roughly


def resolve_config(
    settings: EngineSettings, config: LlamaConfig, memory: int | None = None
) -> ResolvedConfig:
    """Complete the settings with what suits this machine and the model.

    Slots are as many as pay off, or as fit: a slot counts as used by a query of typical length.

    Args:
        settings: what is not left to be chosen.
        config: the model's shape.
        memory: bytes that there are; None: the device's.

    Raises:
        UsageError: the device is not available here, or kernels that are insisted on.
    """
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    kernels, unsupported_reason = _kernels(settings.kernels, config, dtype, device)
    memory = memory or _memory_bytes(device)
    taken = OVERHEAD_BYTES + config.num_weights * dtype.itemsize
    slot_bytes = config.kv_cache_bytes(TYPICAL_TOKENS, dtype.itemsize)
    room = max(min(memory // CACHE_SHARE, memory - taken), slot_bytes)
    kv_cache_bytes = settings.kv_cache_mb << 20 or room
    slots = settings.max_batch_size or max(1, min(MOST_SLOTS, kv_cache_bytes // slot_bytes))
    return ResolvedConfig(
        device=device,
        dtype=dtype,
        kernels=kernels,
        unsupported_reason=unsupported_reason,
        threads=settings.threads or min(num_cores(), torch.get_num_threads()),
        max_batch_size=slots,
        kv_cache_bytes=kv_cache_bytes,
        memory_bytes=memory,
        needed_bytes=taken + min(slots * slot_bytes, kv_cache_bytes),
    )


def resolve_dtype(settings: EngineSettings) -> torch.dtype:
    """The dtype that the settings come to on this machine.

    Raises:
        UsageError: the device is not available here.
    """
    return _dtype(settings.dtype, _device(settings.device))


def features() -> list[str]:
    """What the CPU has that makes an engine fast, as far as torch uses it."""
    checks = {
        "bfloat16": "_is_avx512_bf16_supported",
        "VNNI": "_is_vnni_supported",
        "AMX": "_is_amx_tile_supported",
    }
    found = [name for name, check in checks.items() if getattr(torch.cpu, check, bool)()]
    return [torch.backends.cpu.get_cpu_capability(), *found]


def gpus() -> list[str]:
    """Names of the GPUs that torch can use."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(
            f"device {name!r} is none of auto, cpu, cuda, and cuda:0, cuda:1 and so on"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used here: {reason}; auto takes a GPU where there is one"
        ) from exc
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _kernels(
    name: str, config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Kernels | None, str]:
    """Our own, or None and why they are torch's."""
    if name == "torch":
        return None, "chosen"
    kernels, reason = None, "they are for the CPU"
    if device.type == "cpu":
        try:
            kernels = load_kernels(str(dtype).removeprefix("torch."))
            reason = unsupported_reason(config, kernels) or ""
        except KernelError as exc:
            reason = str(exc)
    if reason and name == "native":
        raise UsageError(f"--kernels native cannot be had: {reason}")
    return (None, reason) if reason else (kernels, "")


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()
