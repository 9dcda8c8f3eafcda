"""The Llama model on the native kernels: a forward pass is one call into kernels.c.

The architecture is that of `torch_ops.model`, but norm weights and scales are not folded into the
matrices; they are applied in float32. Outputs are batch-invariant: the hidden states of a sequence
have the same bits whatever else is in the batch and however many threads compute it.
"""

import ctypes
from typing import Any

import numpy as np

from smolcli.engine.config import LlamaConfig
from smolcli.engine.native.bindings import (
    ALIGNMENT,
    FLOAT32,
    FORMATS,
    Array,
    BatchStruct,
    KernelError,
    Kernels,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    SpaceStruct,
    ThreadTeam,
    address,
    aligned_empty,
    rounded_inputs,
)
from smolcli.engine.native.cache import BufferCache, NativeBatch
from smolcli.engine.native.head import NativeHead
from smolcli.engine.native.packing import (
    DENSE,
    LENGTHS,
    NOT_QUANTIZED,
    PackedLayout,
    pack_into,
    packed_layout,
)
from smolcli.engine.quantized import GROUP, Formats, Weights, formats_of


def unsupported_reason(config: LlamaConfig, kernels: Kernels) -> str | None:
    """Why the kernels cannot run a model of this shape; None if they can."""
    multiples = {
        "hidden_size": (config.hidden_size, kernels.panel),
        "intermediate_size": (config.intermediate_size, kernels.width),
        "head_dim": (config.head_dim, kernels.panel),
    }
    for name, (size, divisor) in multiples.items():
        if size % divisor:
            return f"{name} {size} is not a multiple of {divisor}"
    sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    if kernels.integers and any(size % GROUP for size in sizes):
        return f"of its matrices' input sizes {sizes}, not all are multiples of {GROUP}"
    if config.head_dim > kernels.max_head_dim:
        return f"head_dim {config.head_dim} is greater than {kernels.max_head_dim}"
    if config.group_size > kernels.task_rows:
        return f"{config.group_size} query heads per KV head are more than {kernels.task_rows}"
    return None


class NativeModel:
    """Packed weights and the forward pass; see `interfaces.Model`.

    Args:
        config: a shape that the kernels support.
        weights: float32, float16 or bfloat16 arrays and quantized matrices.
        kernels: the library.
        num_threads: number of threads.

    Raises:
        KeyError: a weight is missing.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        kernels: Kernels,
        num_threads: int = 1,
    ) -> None:
        layout = packed_layout(config, kernels, formats_of(weights))
        packed = aligned_empty((layout.num_bytes,), np.dtype(np.uint8))
        pack_into(packed, config, weights, kernels)
        self._set_up(config, packed, layout, kernels, num_threads)

    @classmethod
    def from_packed(
        cls,
        config: LlamaConfig,
        packed: Array,
        kernels: Kernels,
        num_threads: int = 1,
        formats: Formats = NOT_QUANTIZED,
    ) -> "NativeModel":
        """Create a model from packed weights, such as a memory-mapped file.

        Args:
            config: a shape that the kernels support.
            packed: uint8, as `pack_into` writes it, aligned to 64 bytes; may be read-only.
            kernels: the library that the weights were packed for.
            num_threads: number of threads.
            formats: the formats of the tensors that were packed.

        Raises:
            KernelError: the buffer has the wrong size, or is not aligned.
        """
        layout = packed_layout(config, kernels, formats)
        if len(packed) != layout.num_bytes:
            raise KernelError(
                f"packed weights have {len(packed)} bytes instead of {layout.num_bytes}"
            )
        if address(packed) % ALIGNMENT:
            raise KernelError(f"packed weights are not aligned to {ALIGNMENT} bytes")
        model = cls.__new__(cls)
        model._set_up(config, packed, layout, kernels, num_threads)
        return model

    def _set_up(
        self,
        config: LlamaConfig,
        packed: Array,
        layout: PackedLayout,
        kernels: Kernels,
        num_threads: int,
    ) -> None:
        self.config = config
        self._kernels = kernels
        self._packed = packed  # the structure points into it
        self._struct, self._layers = _model_struct(config, packed, layout, kernels.integers)
        self._team = ThreadTeam(kernels, num_threads)
        self._expanded = _expanded_panels(config, layout, kernels, num_threads)
        self._space = Space(config, kernels, 0, self._expanded)
        self.head = NativeHead(kernels, self._team, self._struct, self._expanded)

    def make_kv_cache(self, prefix_cache_bytes: int) -> BufferCache:
        """See `interfaces.Model`."""
        return BufferCache(self.config, self._kernels, prefix_cache_bytes)

    def forward(self, batch: NativeBatch) -> Array:
        """See `interfaces.Model`; float32.

        Raises:
            FloatingPointError: keys or values for attention in integers are not finite.
        """
        num_rows, spans = len(batch.token_ids), batch.spans
        if num_rows > self._space.num_rows:
            self._space = Space(self.config, self._kernels, num_rows, self._expanded)
        num_hidden = int(spans["num_hidden"].sum())
        hidden = np.empty((num_hidden, self.config.hidden_size), np.float32)
        plan = np.empty((10, num_rows), np.int32)
        struct = BatchStruct(
            token_ids=address(batch.token_ids),
            spans=address(spans),
            hidden=address(hidden),
            plan=address(plan),
            num_spans=len(spans),
            num_rows=num_rows,
            num_hidden=num_hidden,
        )
        space = ctypes.byref(self._space.struct)
        self._team.forward(self._struct, ctypes.byref(struct), space)
        return hidden


def _model_struct(
    config: LlamaConfig, packed: Array, layout: PackedLayout, integers: int
) -> tuple[ModelStruct, Any]:
    """The model as kernels.c expects it, and the layers that it points to."""
    tensors, start = layout.tensors, address(packed)
    at = {name: start + tensor.offset for name, tensor in tensors.items()}

    def field(name: str, kind: type) -> int | MatrixStruct | None:
        if kind is not MatrixStruct:
            return at.get(name)  # only attention in integers has limits
        return MatrixStruct(at[name], FORMATS.index(tensors[name].format))

    layers = (LayerStruct * config.num_layers)(
        *(
            LayerStruct(*(field(f"layers.{index}.{name}", kind) for name, kind in _LAYER_FIELDS))
            for index in range(config.num_layers)
        )
    )
    struct = ModelStruct(
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        integers=integers,
        eps=config.rms_norm_eps,
        layers=ctypes.cast(layers, ctypes.c_void_p),
        embed=field("embed", MatrixStruct),
        head=field("embed" if config.is_tied else "head", MatrixStruct),
        norm=at["norm"],
        cos=at["cos"],
        sin=at["sin"],
        head_lengths=at.get(LENGTHS["embed" if config.is_tied else "head"]),
    )
    return struct, layers


_LAYER_FIELDS: tuple[tuple[str, type], ...] = tuple(
    (field[0], field[1]) for field in LayerStruct._fields_
)


def _expanded_panels(
    config: LlamaConfig, layout: PackedLayout, kernels: Kernels, num_threads: int
) -> Array:
    """The buffer of each thread for a quantized panel, (threads, bytes)."""
    num_bytes = kernels.expanded_bytes
    if any(tensor.format != DENSE for tensor in layout.tensors.values()):
        sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        num_bytes += max(sizes) * kernels.panel * kernels.weight_dtype.itemsize
    buffers = aligned_empty((num_threads, num_bytes + -num_bytes % ALIGNMENT), np.dtype(np.uint8))
    buffers[:, : kernels.expanded_bytes] = 0  # no panel yet
    return buffers


class Space:
    """Buffers for the activations of a step.

    Args:
        config: the model's shape.
        kernels: the library.
        num_rows: maximum number of tokens in a step.
        expanded: the buffer of each thread for a quantized panel, (threads, bytes).
    """

    def __init__(
        self, config: LlamaConfig, kernels: Kernels, num_rows: int, expanded: Array
    ) -> None:
        self.num_rows = num_rows
        hidden, inner = config.hidden_size, config.num_heads * config.head_dim
        stride = num_rows + kernels.width
        x = aligned_empty((num_rows, hidden), FLOAT32)
        squares = aligned_empty((hidden // kernels.panel, stride), FLOAT32)
        widths = {
            "normed": hidden,
            "queries": inner,
            "attended": inner,
            "act": config.intermediate_size,
        }
        elements = {
            name: aligned_empty((num_rows, size), kernels.dtype) for name, size in widths.items()
        }
        rounded = rounded_inputs(num_rows if kernels.integers else 0, max(widths.values()))
        self.struct = SpaceStruct(
            x=address(x),
            squares=address(squares),
            squares_stride=stride,
            expanded=address(expanded),
            expanded_stride=expanded.shape[1],
            rounded=address(rounded),
            **{name: address(array) for name, array in elements.items()},
        )
        self.struct.arrays = (x, squares, expanded, rounded, *elements.values())
