"""Selects the kernel library to load on this machine.

Libraries are compiled ahead of time by tools/build_kernels.py, which also uses this module; it
therefore imports only the standard library.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

FOLDER = Path(__file__).parent
SOURCES = (
    "kernels.c",
    "head.h",
    "int8_attention.h",
    "int8_products.h",
    "team.c",
    "team.h",
    "cpu.c",
)
CPU_LIBRARY = "cpu"
VARIANT_VARIABLE = "SMOL_KERNEL_VARIANT"
BUILD_COMMAND = "python -m tools.build_kernels"


@dataclass(frozen=True, slots=True)
class Variant:
    """Kernels for one level of CPU features.

    Args:
        name: used in file names and SMOL_KERNEL_VARIANT.
        machine: CPU architecture.
        bit: its bit in the result of `smol_cpu_variants` in cpu.c.
        gcc_flag: enables the CPU features in gcc and clang.
        zig_flag: enables them in zig.
        products: the weight formats that it is built for, and whether each uses bfloat16
            instructions.
        dot_bit: in the same result, the bit for dot products of bytes, which the integer products
            of the variant use if the CPU has them.
    """

    name: str
    machine: str
    bit: int
    gcc_flag: str
    zig_flag: str
    products: Mapping[str, bool]
    dot_bit: int


_FLOAT32_PRODUCTS = MappingProxyType({"float32": False, "bfloat16": False})
_BFLOAT16_PRODUCTS = MappingProxyType({"bfloat16": True})
_AVX_VNNI, _AVX512_VNNI, _DOTPROD = 32, 64, 128

# The best variant for a format is the last one that the CPU supports.
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant(
                *("x86-64-v3", "x86_64", 1, "-march=x86-64-v3", "-mcpu=x86_64_v3"),
                *(_FLOAT32_PRODUCTS, _AVX_VNNI),
            ),
            Variant(
                *("x86-64-v4", "x86_64", 2, "-march=x86-64-v4", "-mcpu=x86_64_v4"),
                *(_FLOAT32_PRODUCTS, _AVX512_VNNI),
            ),
            Variant(
                *("x86-64-v4-bf16", "x86_64", 4, "-march=cooperlake", "-mcpu=x86_64_v4+avx512bf16"),
                *(_BFLOAT16_PRODUCTS, _AVX512_VNNI),
            ),
            Variant(
                *("aarch64", "aarch64", 8, "-march=armv8-a", "-mcpu=generic"),
                *(_FLOAT32_PRODUCTS, _DOTPROD),
            ),
            Variant(
                *("aarch64-bf16", "aarch64", 16, "-march=armv8.2-a+bf16", "-mcpu=generic+bf16"),
                *(_BFLOAT16_PRODUCTS, _DOTPROD),
            ),
        )
    }
)


def library_path(name: str, system: str, folder: Path = FOLDER) -> Path:
    """The path of a kernel library.

    Args:
        name: variant and weight format, such as "x86-64-v3-float32".
        system: "linux", "darwin" or "windows".
        folder: the directory of all libraries.
    """
    suffix = {"darwin": ".dylib", "windows": ".dll"}.get(system, ".so")
    return folder / f"libsmol-{name}{suffix}"


def machine_name() -> str:
    """The architecture of this machine, as in `Variant.machine`."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def source_hash(folder: Path = FOLDER) -> str:
    """A digest of the C sources; "" in an installation without them."""
    if not (folder / SOURCES[0]).exists():
        return ""
    text = b"".join((folder / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(text).hexdigest()[:16]


def best_variant(dtype: str, cpu_variants: int, forced: str | None = None) -> Variant | None:
    """The fastest variant for a weight format; None if there is none.

    Args:
        dtype: weight format, "float32" or "bfloat16".
        cpu_variants: bits of the variants that the CPU supports.
        forced: name of the only variant to consider.
    """
    usable = [
        variant
        for variant in VARIANTS.values()
        if dtype in variant.products and variant.bit & cpu_variants
    ]
    if forced:
        usable = [variant for variant in usable if variant.name == forced]
    return usable[-1] if usable else None


def forced_variant() -> str | None:
    """The value of SMOL_KERNEL_VARIANT, if set."""
    return os.environ.get(VARIANT_VARIABLE) or None


def system_name() -> str:
    """The name of this operating system, as in `library_path`."""
    return {"win32": "windows"}.get(sys.platform, sys.platform)
