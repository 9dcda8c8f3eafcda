"""Decoding on a GPU: the kernels of a step, recorded once and replayed without Python.

A GPU computes a step of a small model faster than Python launches its kernels, unless they are
launched as one CUDA graph (Gray 2019, "Getting Started with CUDA Graphs"). A graph always computes
the same shapes at the same addresses, so every row of a slab takes part in its step; rows that have
nothing to compute write to a spare row.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from smolcli.engine.sequence import ScheduledSequence
from smolcli.engine.torch_ops.attention import Batch, SlabSpan
from smolcli.engine.torch_ops.model import TorchModel
from smolcli.engine.torch_ops.slab_cache import Slab, SlabCache

MIN_LENGTH = 256  # positions per row of the shortest slab; each next one has twice as many
EAGER_STEPS = 8  # of a slab before its step is recorded, which costs as much as a few of them

Compute = Callable[[], Tensor]
Record = Callable[[Compute], Compute]

logger = logging.getLogger(__name__)


def power_of_two_length(num_tokens: int) -> int:
    """The slab length for a number of tokens; few lengths, because each one costs a graph."""
    length = MIN_LENGTH
    while length < num_tokens:
        length *= 2
    return length


def record_cuda_graph(device: torch.device, compute: Compute) -> Compute:
    """Record a computation as a CUDA graph.

    Args:
        device: the GPU that computes.
        compute: launches kernels on the current stream and does not wait for them.

    Returns:
        A function that launches all kernels at once, over the same memory, and returns the same
        tensor.

    Raises:
        RuntimeError: the kernels cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),  # restored if recording fails
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class SlabStep:
    """Computes one new token for rows of a slab.

    Args:
        model: the model.
        slab: the slab; must not be used any more once its tensors have been replaced.
        record: records the computation after a few eager steps.
    """

    def __init__(self, model: TorchModel, slab: Slab, record: Record) -> None:
        self._rows = slab.rows
        self._spare_row = slab.capacity
        self._inputs = torch.zeros(3, slab.capacity, dtype=torch.long, device=model.device)
        self._eager = _over_all_rows(model, slab, self._inputs)  # keeps a graph's inputs alive
        self._compute = self._eager
        self._record = record
        self._num_steps = 0

    def __call__(self, items: list[ScheduledSequence]) -> Tensor:
        """The hidden states of items that occupy N rows; (N, hidden_size)."""
        rows = [self._rows[item.sequence] for item in items]
        tokens = [item.sequence.token_ids[item.start] for item in items]
        inputs = torch.zeros(self._inputs.shape, dtype=torch.long)
        inputs[2] = self._spare_row
        inputs[:, rows] = torch.tensor([tokens, [item.start for item in items], rows])
        self._inputs.copy_(inputs)
        if self._num_steps == EAGER_STEPS:
            self._compute = self._record(self._eager)
        self._num_steps += 1
        return self._compute()[rows]


def _over_all_rows(model: TorchModel, slab: Slab, inputs: Tensor) -> Compute:
    """The hidden states of all rows, computed from `inputs`.

    Args:
        model: the model.
        slab: the slab.
        inputs: (3, capacity): token ids, positions, and the rows to store keys and values in.
    """
    token_ids, positions, stored_in = inputs
    keys, values, length = slab.keys, slab.values, slab.length
    all_rows = torch.arange(slab.capacity, device=model.device)

    def compute() -> Tensor:
        span = SlabSpan(keys, values, 0, positions, stored_in, length)
        return model.forward(Batch(token_ids, positions, [span], all_rows))

    return compute


@dataclass(frozen=True, slots=True)
class GraphedBatch:
    """The items of one step: those that decode, slab by slab, then pieces of prompts."""

    decoding: list[tuple[Slab, list[ScheduledSequence]]]
    prompts: Batch | None


class GraphedCache(SlabCache):
    """Slabs of few lengths, each with one spare row."""

    def __init__(self, model: TorchModel, prefix_cache_bytes: int) -> None:
        super().__init__(
            model.config,
            model.dtype,
            model.device,
            prefix_cache_bytes,
            padded_length=power_of_two_length,
            spare_rows=1,
        )

    def make_batch(self, items: list[ScheduledSequence]) -> GraphedBatch:
        """See `interfaces.KVCache`."""
        decoding: list[tuple[Slab, list[ScheduledSequence]]] = []
        num_decoding = 0
        for slab, group in groupby(items, key=lambda item: self.slab_of(item.sequence)):
            if slab is not None:
                decoding.append((slab, list(group)))
                num_decoding += len(decoding[-1][1])
        prompts = items[num_decoding:]
        return GraphedBatch(decoding, self.flat_batch(prompts) if prompts else None)


class GraphedModel:
    """A model whose decoding steps are recorded; see `interfaces.Model`.

    Args:
        model: the model.
        record: records a computation.
    """

    def __init__(self, model: TorchModel, record: Record) -> None:
        self.config = model.config
        self.head = model.head
        self._model = model
        self._record_with: Record | None = record

    def make_kv_cache(self, prefix_cache_bytes: int) -> GraphedCache:
        """See `interfaces.Model`."""
        return GraphedCache(self._model, prefix_cache_bytes)

    def forward(self, batch: GraphedBatch) -> Tensor:
        """See `interfaces.Model`; (N, hidden_size)."""
        hidden = [self._step(slab)(items) for slab, items in batch.decoding]
        if batch.prompts is not None:
            hidden.append(self._model.forward(batch.prompts))
        return torch.cat(hidden)

    def _step(self, slab: Slab) -> Callable[[list[ScheduledSequence]], Tensor]:
        if slab.step is None:
            slab.step = SlabStep(self._model, slab, self._record)
        return slab.step

    def _record(self, compute: Compute) -> Compute:
        """Record a computation; after the first failure, keep computing eagerly."""
        if self._record_with is None:
            return compute
        try:
            return self._record_with(compute)
        except RuntimeError as exc:
            self._record_with = None
            logger.warning("cannot record CUDA graphs, so decoding is slower: %s", exc)
            return compute
