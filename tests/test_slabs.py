"""Slabs of the torch KV cache: their capacity, and their state after an allocation fails."""

from typing import Any

import pytest
import torch

from smolcli.engine.config import LlamaConfig
from smolcli.engine.sequence import Sequence
from smolcli.engine.torch_ops.slab_cache import Slab

CONFIG = LlamaConfig(
    vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=4, max_positions=8192, rms_norm_eps=1e-5, rope_theta=1e4, is_tied=True,
    eos_ids=frozenset({2}),
)  # fmt: skip


def test_a_failed_allocation_leaves_all_tensors_of_a_slab_with_equal_capacity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slab = Slab(CONFIG, 32, torch.empty(0), spare_rows=0)
    sequences = [Sequence([1]) for _ in range(9)]
    for number, sequence in enumerate(sequences[:8]):
        slab.insert(sequence, [(torch.full((1, 5, 4), float(number)),) * 2] * 2)
    new_empty, calls = torch.Tensor.new_empty, iter(range(9))

    def scarce(like: torch.Tensor, *shape: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return new_empty(like, *shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        slab.insert(sequences[8], [])
    assert {len(t) for t in (*slab.keys, *slab.values)} == {slab.capacity} == {8}
    for number, sequence in enumerate(sequences[:8]):
        assert all((keys[:, :5] == number).all() for keys, _ in slab.read(sequence))


@pytest.mark.parametrize(("length", "num_rows", "capacity"), [
    (32, 1, 8), (32, 9, 16), (512, 1, 4), (8192, 1, 1), (8192, 3, 3),
])  # fmt: skip
def test_long_rows_are_not_allocated_in_advance(length: int, num_rows: int, capacity: int) -> None:
    """One long prompt takes the memory that admission reserved for it, not a multiple."""
    slab = Slab(CONFIG, length, torch.empty(0), spare_rows=0)
    prompts = [torch.full((1, 5, 4), float(row)) for row in range(num_rows)]
    sequences = [Sequence([1]) for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        slab.insert(sequence, [(prompt, -prompt)] * 2)
    assert slab.capacity == capacity
    slab.remove(sequences.pop(0))
    for sequence, prompt in zip(sequences, prompts[1:], strict=True):
        for keys, values in slab.read(sequence):
            assert torch.equal(keys[:, :5], prompt)
            assert torch.equal(values[:, :5], -prompt)
