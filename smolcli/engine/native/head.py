"""The final norm and LM head on the native kernels."""

import ctypes

import numpy as np

from smolcli.engine.interfaces import Masks
from smolcli.engine.native.bindings import (
    FLOAT32,
    Array,
    Kernels,
    ModelStruct,
    SpaceStruct,
    ThreadTeam,
    address,
    aligned_empty,
    rounded_inputs,
)

BOUNDED_ROWS = 2  # from which on integer products that bound the logits save time


class NativeHead:
    """See `interfaces.Head`. Logits are computed in float32 in every dtype.

    Args:
        kernels: the library.
        team: the threads that compute.
        struct: the model.
        expanded: the buffer of each thread for a quantized panel, (threads, bytes).
    """

    def __init__(
        self, kernels: Kernels, team: ThreadTeam, struct: ModelStruct, expanded: Array
    ) -> None:
        self._kernels = kernels
        self._team = team
        self._struct = struct
        self._expanded = expanded
        self._num_panels = -(-struct.vocab // kernels.panel)

    def logits(self, x: Array) -> Array:
        """See `interfaces.Head`."""
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((len(x), self._num_panels * self._kernels.panel), np.float32)
        space = self._space(len(x))
        self._team.logits(self._struct, address(x), len(x), ctypes.byref(space), address(out))
        logits: Array = out[:, : self._struct.vocab]
        return logits

    def best(self, x: Array, masks: Masks = ()) -> list[int]:
        """See `interfaces.Head`. Logits are never written to memory.

        Of a quantized LM head in float32, products of integers first exclude most tokens.
        """
        x = np.ascontiguousarray(x, np.float32)
        num_rows = len(x)
        num_bytes = num_rows * self._team.num_threads * self._kernels.best_bytes
        best = aligned_empty((num_bytes,), np.dtype(np.uint8))
        ids = np.empty(num_rows, np.int32)
        bits = self._bits(masks) if any(masks) else None
        bounds = None
        if self._struct.head_lengths and num_rows >= BOUNDED_ROWS:
            bounds = np.empty((self._num_panels + self._team.num_threads + 2, num_rows), np.float32)
        space = self._space(num_rows, is_bounded=bounds is not None)
        self._team.best(
            self._struct,
            address(x),
            num_rows,
            None if bits is None else address(bits),
            ctypes.byref(space),
            address(best),
            None if bounds is None else address(bounds),
            address(ids),
        )
        if (ids < 0).any():
            raise FloatingPointError("the model computed logits that are not numbers")
        token_ids: list[int] = ids.tolist()
        return token_ids

    def _bits(self, masks: Masks) -> Array:
        """The masks, padded to whole panels with ones."""
        bits = np.full((len(masks), self._num_panels * self._kernels.panel // 8), 255, np.uint8)
        for row, mask in zip(bits, masks, strict=True):
            if mask is not None:
                row[: len(mask)] = np.frombuffer(mask, np.uint8)[: len(row)]
        return bits

    def _space(self, num_rows: int, *, is_bounded: bool = False) -> SpaceStruct:
        """Scratch space for the norm of `num_rows` rows."""
        hidden, stride = self._struct.hidden, num_rows + self._kernels.width
        normed = aligned_empty((num_rows, hidden), self._kernels.dtype)
        squares = aligned_empty((hidden // self._kernels.panel, stride), FLOAT32)
        has_integers = self._kernels.integers or is_bounded
        rounded = rounded_inputs(num_rows if has_integers else 0, hidden)
        space = SpaceStruct(
            normed=address(normed),
            squares=address(squares),
            squares_stride=stride,
            expanded=address(self._expanded),
            expanded_stride=self._expanded.shape[1],
            rounded=address(rounded),
        )
        space.arrays = (normed, squares, rounded)
        return space
