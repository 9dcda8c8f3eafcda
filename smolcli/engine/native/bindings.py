"""ctypes bindings for kernels.c and team.c."""

import ctypes
import os
import weakref
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np

from smolcli.engine.dtypes import numpy_dtype
from smolcli.engine.native import library
from smolcli.engine.quantized import BLOCK_FORMATS, GROUP
from smolcli.errors import BackendError

FLOAT32 = np.dtype(np.float32)
ALIGNMENT = 64  # bytes; of weights and scratch space: a cache line, and the widest vector
FORMATS = ("dense", *BLOCK_FORMATS)  # of packed matrices, as numbered in kernels.c
PAIRWISE, BYTEWISE = 1, 2  # instructions of integer products, as numbered in int8_products.h
NOT_FINITE = 4  # a status of smol_forward
ROUNDED_BYTES = 80  # at most, of a group of inputs of an integer product

Array = np.ndarray[Any, Any]

SPAN = np.dtype(
    [
        ("first_row", np.int32),
        ("num_rows", np.int32),
        ("num_hidden", np.int32),
        ("start", np.int32),
        ("length", np.int32),
        ("padding", np.int32),
        ("cache", np.uint64),
    ]
)


class MatrixStruct(ctypes.Structure):
    """A packed matrix and its format, an index into `FORMATS`."""

    _fields_ = [("panels", c_void_p), ("format", c_int32), ("padding", c_int32)]


class LayerStruct(ctypes.Structure):
    """The weights of one layer."""

    _fields_ = [
        *((name, MatrixStruct) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "kv_limits")),
    ]


class ModelStruct(ctypes.Structure):
    """Shapes and weights of a model."""

    _fields_ = [
        *((name, c_int32) for name in ("num_layers", "hidden", "intermediate", "num_heads")),
        *((name, c_int32) for name in ("num_kv_heads", "head_dim", "vocab", "integers")),
        *((name, c_float) for name in ("eps", "padding_2")),
        ("layers", c_void_p),
        *((name, MatrixStruct) for name in ("embed", "head")),
        *((name, c_void_p) for name in ("norm", "cos", "sin", "head_lengths")),
    ]


class BatchStruct(ctypes.Structure):
    """The rows of a step, and their hidden states."""

    _fields_ = [
        *((name, c_void_p) for name in ("token_ids", "spans", "hidden", "plan")),
        *((name, c_int32) for name in ("num_spans", "num_rows", "num_hidden", "padding")),
    ]


class SpaceStruct(ctypes.Structure):
    """Buffers for the activations of a step, kept alive by `arrays`."""

    arrays: tuple[Array, ...]

    _fields_ = [
        *((name, c_void_p) for name in ("x", "normed", "squares", "queries", "attended", "act")),
        ("squares_stride", c_int64),
        ("expanded", c_void_p),
        ("expanded_stride", c_int64),
        ("rounded", c_void_p),
    ]


class KernelError(Exception):
    """A kernel library cannot be loaded or used; the message says why."""


class Kernels:
    """A kernel library for one CPU variant and one weight format.

    Args:
        opened: the shared library.
        name: variant and weight format, such as "x86-64-v3-bfloat16"; ends in "-int8" with integer
            products, whose packed weights and results differ.
        integers: how to multiply matrices, as numbered in int8_products.h; 0 for floating point.

    Attributes:
        source: a digest of the C sources that the library was built from.
        width: float32 values per vector.
        panel: output columns per panel of packed weights.
        task_rows: maximum number of query rows of one KV head in an attention task.
        max_head_dim: maximum size of a head.
        weight_dtype: dtype of packed weights that are not quantized.
        dtype: dtype of activations.
        has_integer_attention: whether attention is computed in integers; see int8_attention.h.
        cache_dtype: dtype of the KV cache: `dtype`, or int16 for attention in integers.

    Raises:
        KernelError: the library does not match these bindings.
    """

    def __init__(self, opened: ctypes.CDLL, name: str, integers: int = 0) -> None:
        self.name = name
        self.source = _text(opened, "smol_source")
        self.integers = integers
        self.width = c_int32.in_dll(opened, "smol_width").value
        self.panel = 2 * self.width
        self.task_rows = c_int32.in_dll(opened, "smol_task_rows").value
        self.max_head_dim = c_int32.in_dll(opened, "smol_max_head_dim").value
        has_bf16_weights, has_bf16_products = (c_int32 * 2).in_dll(opened, "smol_formats")
        self.weight_dtype = numpy_dtype("bfloat16" if has_bf16_weights else "float32")
        self.dtype = numpy_dtype("bfloat16" if has_bf16_products else "float32")
        self.has_integer_attention = bool(integers) and not has_bf16_products
        self.cache_dtype = np.dtype(np.int16) if self.has_integer_attention else self.dtype
        *sizes, self.expanded_bytes, self.best_bytes = (c_int32 * 7).in_dll(
            opened, "smol_struct_sizes"
        )
        structs = (LayerStruct, ModelStruct, BatchStruct, SpaceStruct)
        layer, model, batch, space = map(ctypes.sizeof, structs)
        if sizes != [layer, model, SPAN.itemsize, batch, space]:
            raise KernelError(f"{name}: structure sizes {sizes} differ from those of bindings.py")
        pointer, number = c_void_p, c_int32
        self._create = _typed(opened.smol_team_create, c_void_p, number)
        self._destroy = _typed(opened.smol_team_destroy, None, pointer)
        self._forward = _typed(
            opened.smol_forward,
            *(number, pointer, ctypes.POINTER(ModelStruct), ctypes.POINTER(BatchStruct)),
            ctypes.POINTER(SpaceStruct),
        )
        head = (pointer, ctypes.POINTER(ModelStruct), pointer, number)
        self._logits = _typed(
            opened.smol_logits, number, *head, ctypes.POINTER(SpaceStruct), pointer
        )
        self._best = _typed(
            opened.smol_best,
            *(number, *head, pointer, ctypes.POINTER(SpaceStruct), pointer, pointer, pointer),
        )


@cache
def load_kernels(dtype: str, has_integer_products: bool = False) -> Kernels:
    """Load the fastest kernels for a weight format that this CPU can run.

    The environment variable SMOL_KERNEL_VARIANT selects another variant, for tests.

    Args:
        dtype: format of the weights, "float32" or "bfloat16".
        has_integer_products: whether to multiply integers; matrices that are not quantized are
            quantized when they are packed.

    Raises:
        KernelError: the kernels do not support this CPU, are not built, or are out of date.
    """
    machine, forced = library.machine_name(), library.forced_variant()
    if not any(variant.machine == machine for variant in library.VARIANTS.values()):
        raise KernelError(f"no native kernels are available for {machine}")
    cpu_variants: int = _open_library(library.CPU_LIBRARY).smol_cpu_variants()
    variant = library.best_variant(dtype, cpu_variants, forced)
    if variant is None and forced:
        raise KernelError(
            f"{library.VARIANT_VARIABLE}={forced} has no {dtype} kernels for this CPU"
        )
    if variant is None:
        needed = {"x86_64": "AVX2 and FMA"}.get(machine, "NEON")
        raise KernelError(f"the CPU lacks {needed}, which the native kernels need")
    name = f"{variant.name}-{dtype}"
    if not has_integer_products:
        return Kernels(_open_library(name), name)
    integers = BYTEWISE if variant.dot_bit & cpu_variants else PAIRWISE
    return Kernels(_open_library(name), f"{name}-int8", integers)


def _open_library(name: str) -> ctypes.CDLL:
    """Open a library and check that it was built from the C sources next to it, if present."""
    path = library.library_path(name, library.system_name(), library.FOLDER)
    advice = f"build them with `{library.BUILD_COMMAND}`"
    if not path.exists():
        raise KernelError(f"the native kernels are not built ({path.name} is missing): {advice}")
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as exc:
        raise KernelError(f"cannot load the native kernels: {exc}") from exc
    expected = library.source_hash(library.FOLDER)
    if expected and f"smol-source-{expected}" != _text(opened, "smol_source"):
        raise KernelError(f"the native kernels are older than their source: {advice}")
    return opened


def _text(opened: ctypes.CDLL, name: str) -> str:
    return ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(opened, name))).decode()


class ThreadTeam:
    """The threads that compute the steps of one model; see team.c.

    Threads do not survive `fork`, so a child process starts a new team on first use. The threads
    exit when the object is garbage collected.

    Args:
        kernels: the library.
        num_threads: number of threads, including the calling one.

    Raises:
        BackendError: the threads cannot be started.
    """

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        self.num_threads = num_threads
        self._kernels = kernels
        self._start()

    def forward(self, *arguments: Any) -> None:
        """Call smol_forward; arguments as in kernels.c, without the team."""
        self._call(self._kernels._forward, arguments)

    def logits(self, *arguments: Any) -> None:
        """Call smol_logits; arguments as in kernels.c, without the team."""
        self._call(self._kernels._logits, arguments)

    def best(self, *arguments: Any) -> None:
        """Call smol_best; arguments as in kernels.c, without the team."""
        self._call(self._kernels._best, arguments)

    def _start(self) -> None:
        self._pid = os.getpid()
        self._handle = self._kernels._create(self.num_threads)
        if not self._handle:
            raise BackendError(
                f"cannot start {self.num_threads} threads; lower the number of threads, "
                "or raise the limit on processes or threads"
            )
        # Not at exit, where another thread may be in a step. The process ends the threads.
        weakref.finalize(self, self._kernels._destroy, self._handle).atexit = False

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        if self._pid != os.getpid():
            self._start()
        status = function(self._handle, *arguments)
        if status:
            if status == NOT_FINITE:
                raise FloatingPointError("the model computed keys or values that are not finite")
            reasons = {
                1: "the process was forked",
                2: "the team is in use by another thread",
                3: "the weights are not aligned",
            }
            raise KernelError(f"{self._kernels.name}: {reasons[status]}")


def address(array: Array) -> int:
    """The address of the first value of a contiguous array."""
    assert array.flags.c_contiguous
    return array.ctypes.data


def aligned_empty(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
    """An uninitialized array whose address is a multiple of ALIGNMENT."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def rounded_inputs(num_rows: int, features: int) -> Array:
    """Scratch space for the inputs of a product of integers."""
    return aligned_empty((num_rows, features // GROUP, ROUNDED_BYTES), np.dtype(np.uint8))


def _typed(function: Any, result: Any, *arguments: Any) -> Any:
    function.argtypes, function.restype = arguments, result
    return function
