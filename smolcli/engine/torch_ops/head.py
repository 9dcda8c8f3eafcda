"""From hidden states to the next token: the vocabulary's scores, and the best of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from smolcli.engine.interfaces import Masks, forbid
from smolcli.engine.torch_ops.linear import make_linear

NEAR_TIE = 0.25  # two steps of a bfloat16 between 16 and 32, where the largest logits lie
BLOCK = 128


class TorchHead:
    """The last norm and the projection to the vocabulary.

    Args:
        weight: (vocab_size, hidden), in the dtype to compute in.
        norm: (hidden,), the weight of the last norm.
        eps: of the norm.
    """

    def __init__(self, weight: Tensor, norm: Tensor, eps: float) -> None:
        self._weight = weight
        self._norm = norm.to(weight.device, torch.float32)
        self._eps = eps
        self._project = make_linear((weight.float() * self._norm).to(weight.dtype))
        self._block = math.gcd(len(weight), BLOCK)

    def logits(self, x: Tensor) -> Tensor:
        """(N, hidden) -> (N, vocab_size), float32."""
        return self._project(F.rms_norm(x, x.shape[-1:], None, self._eps)).float()

    def refine(self, x: Tensor, logits: Tensor, width: int) -> None:
        """Compute the `width` largest logits of each row of x again in float32, in place.

        Those that are minus infinity stay so.
        """
        if x.dtype != torch.float32:
            rough, ids = logits.topk(width)  # (N, width)
            rows = torch.arange(len(x), device=x.device).repeat_interleave(width)
            exact = self._exact(x, rows, ids.flatten()).view_as(rough)
            logits.scatter_(1, ids, torch.where(rough.isinf(), rough, exact))

    def best(self, x: Tensor, masks: Masks = ()) -> list[int]:
        """See `model.Head`.

        Bfloat16 rounds logits near 25 to steps of 0.125, which makes ties of close calls: the few
        that come near the largest are computed again in float32. They are looked for block by
        block, because argmax over a whole vocabulary is slow on a CPU.
        """
        logits = self.logits(x)
        if masks:
            forbid(logits, masks)
        logits = logits.view(len(x), -1, self._block)  # (N, blocks, block)
        highest = logits.amax(-1)
        margin = 0.0 if x.dtype == torch.float32 else NEAR_TIE
        floor = highest.amax(-1, keepdim=True) - margin  # (N, 1)
        rows, blocks = (highest >= floor).nonzero(as_tuple=True)
        candidates = logits[rows, blocks]  # (K, block)
        which, offsets = (candidates >= floor[rows]).nonzero(as_tuple=True)
        rows, ids = rows[which], blocks[which] * self._block + offsets
        scores = candidates[which, offsets] if margin == 0.0 else self._exact(x, rows, ids)
        return _best_of_each(len(x), rows.tolist(), ids.tolist(), scores.tolist())

    def _exact(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """The logits of tokens `ids` for the given rows, in float32; all (K,)."""
        normed = F.rms_norm(x.float(), x.shape[-1:], self._norm, self._eps)
        return (normed[rows] * self._weight[ids]).sum(-1)


def _best_of_each(count: int, rows: list[int], ids: list[int], scores: list[float]) -> list[int]:
    best: dict[int, tuple[float, int]] = {}
    for row, token, score in zip(rows, ids, scores, strict=True):
        if row not in best or score > best[row][0]:
            best[row] = (score, token)
    if len(best) < count:
        raise FloatingPointError("the model computed logits that are not numbers")
    return [best[row][1] for row in range(count)]
