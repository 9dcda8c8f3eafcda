"""Our kernels, where this machine can have them."""

from pathlib import Path

import pytest
import torch

from smolcli.engine.model import Model
from smolcli.engine.native.build import NoKernels, load_kernels
from smolcli.engine.native.kernels import Kernels
from smolcli.models.load import load_model

KERNELS = ("native", "torch")


def native_kernels(dtype: torch.dtype) -> Kernels:
    """Ours; the test is skipped where there are none."""
    try:
        return load_kernels(dtype)
    except NoKernels as exc:
        pytest.skip(str(exc))


def load(folder: Path, dtype: torch.dtype, kernels: str) -> Model:
    """Our model, computed by our own kernels or torch's."""
    ours = native_kernels(dtype) if kernels == "native" else None
    return load_model(folder, dtype, torch.device("cpu"), ours)
