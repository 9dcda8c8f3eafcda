"""NumPy's dtypes by name, with bfloat16."""

from typing import Any

import numpy as np


def numpy_dtype(name: str) -> "np.dtype[Any]":
    """The dtype called `name`; only "bfloat16" imports the library that adds it to NumPy."""
    scalar: Any = name
    if name == "bfloat16":
        import ml_dtypes

        scalar = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(scalar)
    return found
