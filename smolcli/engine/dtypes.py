"""The dtypes of weights, by their names in NumPy and in files."""

from typing import Any

import numpy as np

FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' and GGUF's


def numpy_dtype(name: str) -> "np.dtype[Any]":
    """The dtype called `name`; only "bfloat16" imports the library that adds it to NumPy."""
    scalar: Any = name
    if name == "bfloat16":
        import ml_dtypes

        scalar = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(scalar)
    return found
