"""What torch knows about GPUs."""

import torch


def check_device(name: str) -> None:
    """Allocate on a device to see that it works.

    Raises:
        RuntimeError: torch cannot use it; the text says why.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as exc:
        raise RuntimeError(str(exc).splitlines()[0]) from exc


def has_bfloat16(name: str) -> bool:
    """Whether a GPU multiplies bfloat16 natively."""
    with torch.cuda.device(name):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def memory_bytes(name: str) -> int:
    """The total memory of a GPU."""
    return int(torch.cuda.get_device_properties(name).total_memory)


def gpu_names() -> list[str]:
    """The GPUs that torch can use."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
