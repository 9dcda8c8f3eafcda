"""From hidden states to the next token."""

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolcli.engine.interfaces import Array, Masks
from smolcli.engine.native.bindings import Kernels, ModelStruct, address


class NativeHead:
    """See `model.Head`; logits are summed in float32 and never rounded to less.

    Args:
        kernels: what computes.
        struct: the model.
    """

    def __init__(self, kernels: Kernels, struct: ModelStruct) -> None:
        self._kernels = kernels
        self._struct = struct
        self._best_bytes = struct.num_threads * 8 * kernels.width

    def logits(self, x: Tensor) -> Array:
        """See `model.Head`."""
        vocab, panel = self._struct.vocab, self._kernels.panel
        x, normed = self._inputs(x)
        out = torch.empty(len(x), -(-vocab // panel) * panel)
        self._kernels.logits(
            ctypes.byref(self._struct), address(x), len(x), address(normed), address(out)
        )
        logits: Array = out[:, :vocab].numpy()
        return logits

    def best(self, x: Tensor, masks: Masks = ()) -> list[int]:
        """See `model.Head`; no logit is written to memory."""
        x, normed = self._inputs(x)
        found = torch.empty(len(x) * self._best_bytes, dtype=torch.uint8)
        ids = torch.empty(len(x), dtype=torch.int32)
        bits = self._bits(masks) if any(masks) else None
        self._kernels.best(
            ctypes.byref(self._struct),
            address(x),
            len(x),
            None if bits is None else address(bits),
            address(normed),
            address(found),
            address(ids),
        )
        if (ids < 0).any():
            raise FloatingPointError("the model computed logits that are not numbers")
        return ids.tolist()

    def _bits(self, masks: Masks) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The masks side by side, in whole panels."""
        panel = self._kernels.panel
        bits = np.full((len(masks), -(-self._struct.vocab // panel) * panel // 8), 255, np.uint8)
        for row, mask in zip(bits, masks, strict=True):
            if mask is not None:
                row[: len(mask)] = np.frombuffer(mask, np.uint8)[: len(row)]
        return bits

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x without gaps, and space for what the last norm makes of it."""
        return x.contiguous(), torch.empty(x.shape, dtype=self._kernels.dtype)
