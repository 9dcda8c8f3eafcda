"""Decoding on a GPU: the kernels of a step, recorded once and replayed without Python.

A GPU computes a step of a small model faster than Python launches its kernels, unless they are
launched as one CUDA graph (Gray 2019, "Getting Started with CUDA Graphs"). A graph computes the
same shapes at the same addresses every time: so all rows of a slab take part in its step, and
those that should not write to a row that is nobody's.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from smolcli.engine.sequence import ScheduledSequence
from smolcli.engine.torch_ops.attention import SlabSpan
from smolcli.engine.torch_ops.batch import Batch
from smolcli.engine.torch_ops.model import TorchModel
from smolcli.engine.torch_ops.slab_cache import Slab, SlabCache

SHORTEST = 256  # positions in a row of the first slab; the next have twice as many
PLAIN_STEPS = 8  # of a slab, before its step is recorded, which takes as long as a few of them

Compute = Callable[[], Tensor]
Record = Callable[[Compute], Compute]

log = logging.getLogger(__name__)


def fixed_length(num_tokens: int) -> int:
    """The slab length for so many tokens, where each length costs a graph."""
    length = SHORTEST
    while length < num_tokens:
        length *= 2
    return length


def record_cuda_graph(device: torch.device, compute: Compute) -> Compute:
    """What launches all kernels of `compute` at once, over the same memory, for the same result.

    Args:
        device: which GPU computes.
        compute: launches kernels on its current stream, and waits for nothing.

    Raises:
        RuntimeError: they cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),  # back to it where recording fails
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class SlabStep:
    """One new token for rows of a slab.

    Args:
        model: computes it.
        slab: as it is now; once its tensors have moved, this must not be called any more.
        record: records what is computed, when it has been computed a few times.
    """

    def __init__(self, model: TorchModel, slab: Slab, record: Record) -> None:
        self._rows = slab.rows
        self._spare_row = slab.capacity
        self._inputs = torch.zeros(3, slab.capacity, dtype=torch.long, device=model.device)
        self._plain = _over_all_rows(model, slab, self._inputs)  # holds what a graph reads
        self._compute = self._plain
        self._record = record
        self._num_steps = 0

    def __call__(self, works: list[ScheduledSequence]) -> Tensor:
        """Hidden states, (N, hidden), of works on N rows."""
        rows = [self._rows[work.sequence] for work in works]
        tokens = [work.sequence.token_ids[work.start] for work in works]
        inputs = torch.zeros(self._inputs.shape, dtype=torch.long)
        inputs[2] = self._spare_row
        inputs[:, rows] = torch.tensor([tokens, [work.start for work in works], rows])
        self._inputs.copy_(inputs)
        if self._num_steps == PLAIN_STEPS:
            self._compute = self._record(self._plain)
        self._num_steps += 1
        return self._compute()[rows]


def _over_all_rows(model: TorchModel, slab: Slab, inputs: Tensor) -> Compute:
    """Hidden states of all rows from their token ids, positions, and rows to store in."""
    token_ids, positions, stored_in = inputs
    keys, values, length = slab.keys, slab.values, slab.length
    all_rows = torch.arange(slab.capacity, device=model.device)

    def compute() -> Tensor:
        span = SlabSpan(keys, values, 0, positions, stored_in, length)
        return model.forward(Batch(token_ids, positions, [span], all_rows))

    return compute


@dataclass(frozen=True, slots=True)
class GraphedBatch:
    """The works of one step: those on rows, slab by slab, then pieces of prompts."""

    decoding: list[tuple[Slab, list[ScheduledSequence]]]
    prompts: Batch | None


class GraphedCache(SlabCache):
    """Slabs of few lengths, each with a row that is nobody's."""

    def __init__(self, model: TorchModel, prefix_cache_bytes: int) -> None:
        shape = (model.config, model.dtype, model.device, prefix_cache_bytes)
        super().__init__(*shape, padded_length=fixed_length, spare_rows=1)

    def make_batch(self, works: list[ScheduledSequence]) -> GraphedBatch:
        """See `model.Cache`."""
        decoding: list[tuple[Slab, list[ScheduledSequence]]] = []
        num_decoding = 0
        for slab, group in groupby(works, key=lambda work: self.slab_of(work.sequence)):
            if slab is not None:
                decoding.append((slab, list(group)))
                num_decoding += len(decoding[-1][1])
        prompts = works[num_decoding:]
        return GraphedBatch(decoding, self.flat_batch(prompts) if prompts else None)


class GraphedModel:
    """A model whose decoding is recorded; see `model.Model`.

    Args:
        model: what is recorded.
        record: how.
    """

    def __init__(self, model: TorchModel, record: Record) -> None:
        self.config = model.config
        self.head = model.head
        self._model = model
        self._record_with: Record | None = record

    def make_kv_cache(self, prefix_cache_bytes: int) -> GraphedCache:
        """See `model.Model`."""
        return GraphedCache(self._model, prefix_cache_bytes)

    def forward(self, batch: GraphedBatch) -> Tensor:
        """See `model.Model`."""
        hidden = [self._step(slab)(works) for slab, works in batch.decoding]
        if batch.prompts is not None:
            hidden.append(self._model.forward(batch.prompts))
        return torch.cat(hidden)

    def _step(self, slab: Slab) -> Callable[[list[ScheduledSequence]], Tensor]:
        if slab.step is None:
            slab.step = SlabStep(self._model, slab, self._record)
        return slab.step

    def _record(self, compute: Compute) -> Compute:
        """Recorded where that works; where it fails once, it is not tried again."""
        if self._record_with is None:
            return compute
        try:
            return self._record_with(compute)
        except RuntimeError as exc:
            self._record_with = None
            log.warning("steps are not replayed as CUDA graphs, which is slower: %s", exc)
            return compute
