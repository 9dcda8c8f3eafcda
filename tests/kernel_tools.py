"""Models for engine tests, on every implementation that this machine supports."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tape import Tape

from smolcli.engine.interfaces import Batch, Head, Hidden, Model
from smolcli.engine.native.bindings import KernelError, Kernels, load_kernels
from smolcli.engine.torch_ops.cuda_graphs import GraphedModel
from smolcli.engine.torch_ops.model import TorchModel
from smolcli.settings import ResolvedDtype
from smolcli.weights.loader import load_model

KERNELS = ("native", "torch")
GPU = ("cuda",) if torch.cuda.is_available() else ()


def native_kernels(dtype: ResolvedDtype) -> Kernels:
    """The native kernels; skips the test if this machine has none. int8 is based on float32."""
    try:
        if dtype == "int8":
            return load_kernels("float32", has_integer_products=True)
        return load_kernels(dtype)
    except KernelError as exc:
        pytest.skip(str(exc))


def load(folder: Path, dtype: ResolvedDtype, kernels: str) -> Model:
    """Our model, computed by one of `KERNELS` or `GPU`, or by "graphs": CUDA graphs on the CPU."""
    if kernels == "cuda":
        return load_model(folder, dtype, "cuda")
    native = native_kernels(dtype) if kernels == "native" else None
    model = load_model(folder, dtype, "cpu", native)
    if kernels == "graphs":
        assert isinstance(model, TorchModel)
        return GraphedModel(model, lambda compute: Tape().record(compute))
    return model


class Endless:
    """A model without an end-of-sequence token."""

    def __init__(self, model: Model) -> None:
        self.config = replace(model.config, eos_ids=frozenset())
        self.head: Head = model.head
        self.make_kv_cache = model.make_kv_cache
        self._model = model

    def forward(self, batch: Batch) -> Hidden:
        return self._model.forward(batch)
