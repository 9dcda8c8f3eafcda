"""NumPy's dtypes by name, with bfloat16."""

from typing import Any

import numpy as np


def numpy_dtype(name: str) -> "np.dtype[Any]":
    """The dtype called `name`; only "bfloat16" imports the library that adds it to NumPy."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
