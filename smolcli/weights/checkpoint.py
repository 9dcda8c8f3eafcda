"""The weights of a model directory, memory-mapped and checked against config.json.

They are safetensors files or, if the model was quantized, its original GGUF file.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from smolcli.engine.config import LlamaConfig
from smolcli.engine.dtypes import FLOAT_DTYPES, numpy_dtype
from smolcli.engine.quantized import Array, Weight, Weights, formats_of
from smolcli.errors import ModelError
from smolcli.weights import gguf_weights
from smolcli.weights.store import GGUF_FILE, shard_names

LAYER = re.compile(r"layers\.(\d+)\.")
UNUSED = re.compile(r"lm_head\.weight|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def load_weights(folder: Path, config: LlamaConfig) -> Weights:
    """Map the weights of a model into memory, read-only.

    They are not copied, except for quantized ones in a format that no kernel reads, which are
    expanded to float32.

    Args:
        folder: the model directory.
        config: what its config.json says, which decides the tensors and their shapes.

    Returns:
        Quantized matrices, and tensors in float32, float16 or bfloat16, by their names without the
        leading "model.".

    Raises:
        ModelError: a file is damaged, or a tensor is missing, unknown, or has the wrong shape or
            number format.
    """
    stored: dict[str, Weight] = {}
    if gguf_weights.is_in(folder):
        stored |= gguf_weights.load(folder, config)
    else:
        for path in weight_files(folder):
            stored |= {name.removeprefix("model."): array for name, array in _tensors(path)}
    weights: dict[str, Weight] = {}
    for name, shape in tensor_shapes(config):
        if name not in stored:
            raise ModelError(f"{folder}: the weights have no tensor {name}")
        if stored[name].shape != shape:
            raise ModelError(
                f"{folder}: the tensor {name} has the shape {list(stored[name].shape)}, but "
                f"config.json requires {list(shape)}"
            )
        weights[name] = stored[name]
    for name in sorted(stored.keys() - weights.keys()):
        _check_unused(folder, name, config)
    return weights


def weight_formats(folder: Path, config: LlamaConfig) -> Mapping[str, str]:
    """The dtype or quantized format of each matrix that `load_weights` returns.

    Reads only the names, formats and shapes of the tensors.

    Raises:
        ModelError: as `load_weights`.
    """
    if gguf_weights.is_in(folder):
        return gguf_weights.matrix_formats(folder)
    weights = load_weights(folder, config)
    return formats_of({name: weight for name, weight in weights.items() if weight.ndim > 1})


def tensor_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of all tensors of a Llama checkpoint; matrices are (out, in)."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "embed_tokens.weight", (config.vocab_size, hidden)
    yield "norm.weight", (hidden,)
    if not config.is_tied:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for index in range(config.num_layers):
        for name, shape in {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            yield f"layers.{index}.{name}.weight", shape


def weight_files(folder: Path) -> list[Path]:
    """The GGUF or safetensors files that make up a checkpoint.

    An index or model.safetensors takes precedence, because a directory may also contain the same
    weights in another layout, such as Mistral's consolidated.safetensors.
    """
    if gguf_weights.is_in(folder):
        return [folder / GGUF_FILE]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in shard_names(index)]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """All tensors of a file, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:  # checks the header and the file's size
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            layouts = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    except (SafetensorError, OSError, ValueError) as exc:
        raise ModelError(f"{path} is damaged or unreadable: {exc}") from exc
    for name, (dtype_name, _) in layouts.items():
        if dtype_name not in FLOAT_DTYPES:
            raise ModelError(
                f"{path}: the tensor {name} is stored as {dtype_name}; smol supports "
                f"{', '.join(FLOAT_DTYPES)}"
            )
    dtypes = {
        dtype_name: numpy_dtype(FLOAT_DTYPES[dtype_name]) for dtype_name, _ in layouts.values()
    }
    sizes = {
        name: math.prod(shape) * dtypes[dtype_name].itemsize
        for name, (dtype_name, shape) in layouts.items()
    }
    start = len(data) - sum(sizes.values())  # the format allows no gaps and nothing after the data
    for name, (dtype_name, shape) in layouts.items():
        flat, start = data[start : start + sizes[name]], start + sizes[name]
        yield name, np.require(flat.view(dtypes[dtype_name]).reshape(shape), requirements="A")


def _check_unused(folder: Path, name: str, config: LlamaConfig) -> None:
    """Raise ModelError for a tensor that would change the answers if smol knew how to use it."""
    if UNUSED.fullmatch(name):
        return
    layer = LAYER.match(name)
    if layer and int(layer[1]) >= config.num_layers:
        raise ModelError(
            f"{folder}: the weights have a tensor {name}, but config.json says that there are "
            f"{config.num_layers} layers (num_hidden_layers)"
        )
    raise ModelError(f"{folder}: the weights have a tensor {name}, which smol does not support")
