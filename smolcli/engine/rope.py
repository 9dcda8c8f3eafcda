"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor

from smolcli.engine.config import LlamaConfig


def rotary_angles(config: LlamaConfig) -> Tensor:
    """By how much each pair of a head is turned at each position; (max_positions, head_dim / 2)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    return torch.outer(positions, config.rope_theta**-exponents)
