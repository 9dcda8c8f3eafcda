"""A CUDA graph for the CPU: operators are recorded once and replayed over the same tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOT_IN_A_GRAPH = (  # these wait for the device, or copy data to it that a replay would not copy
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.lift_fresh.default,
)


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that run, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_replays = 0
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in NOT_IN_A_GRAPH:
            raise RuntimeError(f"{func} cannot be recorded")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a computation; the interface is that of `record_cuda_graph`."""
        with self:
            result = compute()
        return lambda: self._replay(result)

    def _replay(self, result: Tensor) -> Tensor:
        self.num_replays += 1
        for func, args, kwargs, old in self._calls:
            new = func(*args, **kwargs)
            for target, source in zip(tree_leaves(old), tree_leaves(new), strict=True):
                if target.data_ptr() != source.data_ptr():
                    target.copy_(source)
        return result
