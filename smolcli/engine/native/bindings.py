"""The structures and functions of kernels.c in Python's words."""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
import torch

SPAN = np.dtype(
    [
        ("first_row", np.int32),
        ("num_rows", np.int32),
        ("start", np.int32),
        ("length", np.int32),
        ("cache", np.uint64),
    ]
)


class LayerStruct(ctypes.Structure):
    """The weights of one layer."""

    _fields_ = [
        (name, c_void_p) for name in ("qkv", "out", "gate_up", "down", "input_norm", "mlp_norm")
    ]


class ModelStruct(ctypes.Structure):
    """Shapes and weights."""

    _fields_ = [
        *((name, c_int32) for name in ("num_layers", "hidden", "intermediate", "num_heads")),
        *((name, c_int32) for name in ("num_kv_heads", "head_dim", "vocab", "num_threads")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("layers", "embed", "head", "norm", "cos", "sin")),
    ]


class SpaceStruct(ctypes.Structure):
    """Where intermediate values go."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "normed", "qkv", "queries", "mixed", "act", "scores")),
        ("scores_stride", c_int64),
    ]


class Kernels:
    """One library; arguments that are tensors or arrays are passed by `address`.

    `width` numbers are computed with at a time, up to `tile_rows` rows of a batch, and weights are
    laid out in panels of `panel` columns and lanes of `lane` elements.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.width = c_int32.in_dll(library, "width").value
        self.tile_rows = c_int32.in_dll(library, "tile_rows").value
        self.panel = 2 * self.width
        self.lane = 4 // dtype.itemsize
        model, space = ctypes.POINTER(ModelStruct), ctypes.POINTER(SpaceStruct)
        self.forward = _typed(
            library.forward, model, c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_int32, space
        )
        self.logits = _typed(library.logits, model, c_void_p, c_int32, c_void_p, c_void_p)
        self.best = _typed(
            library.best, model, c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p
        )


def address(array: "torch.Tensor | np.ndarray[Any, Any]") -> int:
    """Where the values of a tensor or an array lie, one after the other."""
    if isinstance(array, torch.Tensor):
        assert array.is_contiguous()
        return array.data_ptr()
    assert array.flags.c_contiguous
    return array.ctypes.data


def _typed(function: Any, *arguments: Any) -> Callable[..., None]:
    function.argtypes, function.restype = arguments, None
    return function  # type: ignore[no-any-return]
