"""What constraints allow: one bit for each token, from the lowest of the first byte on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Masks = Sequence[bytes | None]  # one for each row; None allows all


def forbid(logits: Tensor, masks: Masks) -> None:
    """Set to minus infinity, in place, what the masks do not allow of (N, vocab_size)."""
    for row, mask in zip(logits, masks, strict=True):
        if mask is not None:
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(row), bitorder="little")
            allowed = torch.from_numpy(bits.view(np.bool_)).to(row.device)
            row.masked_fill_(~allowed, -torch.inf)
