"""Linear layers whose weight is laid out once for the machine, with what follows them fused in.

`F.linear` reorders the weight at every call on x86; oneDNN's packed form, reached through
operators that are private to torch, does it once. Where they are missing, or on a GPU, the
same layer runs on `F.linear`.
"""

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """`x @ weight.T` for x of (T, in_features), and its fused forms."""

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in_features) -> (T, out_features)."""
        ...

    def silu(self, x: Tensor) -> Tensor:
        """silu(x @ weight.T)."""
        ...

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T) * other."""
        ...

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T) + other."""
        ...


def make_linear(weight: Tensor) -> Linear:
    """The fastest layer that this machine has for `weight` of (out_features, in_features)."""
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        return PackedLinear(weight)
    return PlainLinear(weight)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch here has the packed operators and they compute what they should."""
    weight = torch.arange(32 * 16).reshape(32, 16).remainder(7).to(dtype)
    x = torch.arange(3 * 16).reshape(3, 16).remainder(5).to(dtype)
    plain = PlainLinear(weight)
    try:
        packed = PackedLinear(weight)
        return torch.equal(packed(x), plain(x)) and torch.equal(
            packed.plus(x, plain(x)), plain.plus(x, plain(x))
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


class PackedLinear:
    """A weight in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        self._unary = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        return self._unary(x, self._weight, None, "none", [], "")  # type: ignore[no-any-return]

    def silu(self, x: Tensor) -> Tensor:
        return self._unary(x, self._weight, None, "swish", [], "")  # type: ignore[no-any-return]

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, self._weight, None, "mul")  # type: ignore[no-any-return]

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, self._weight, None, "add")  # type: ignore[no-any-return]


class PlainLinear:
    """A weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(F.linear(x, self._weight))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return F.linear(x, self._weight) * other

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return F.linear(x, self._weight) + other
