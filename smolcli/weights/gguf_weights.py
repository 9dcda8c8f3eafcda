"""The weights of a model that is stored as the GGUF file that it came in.

Reading the header of a GGUF file takes longer than starting smol, because it contains the whole
vocabulary, so the places of the tensors are kept in a small index next to the file.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smolcli.engine.config import LlamaConfig
from smolcli.engine.dtypes import numpy_dtype
from smolcli.engine.quantized import BLOCK_BYTES, GROUP, Array, QuantizedMatrix, Weight
from smolcli.errors import ModelError

FILE = "model.gguf"
INDEX = "model.gguf.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # GGUF's names
READ_AS = {"Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q8_0": "Q8_0", "Q5_0": "Q8_0"}  # without loss


def is_in(folder: Path) -> bool:
    """Whether a model directory contains its weights as a GGUF file."""
    return (folder / INDEX).is_file() and (folder / FILE).is_file()


def write_index(folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index of the GGUF file in a model directory.

    Args:
        folder: the model directory.
        tensors: `type`, such as "Q4_1", `shape`, outermost dimension first, and `offset` in the
            file, by the tensors' names in a Llama checkpoint, without the leading "model.".
    """
    text = json.dumps({"tensors": tensors}, separators=(",", ":"))
    (folder / INDEX).write_text(f"{text}\n", "utf-8")


def is_worth_keeping(sizes: Mapping[str, int]) -> bool:
    """Whether most weights are in formats that the kernels read.

    Args:
        sizes: the number of weights in matrices of each GGUF type.
    """
    kept = sum(size for kind, size in sizes.items() if kind in READ_AS)
    return 2 * kept > sum(sizes.values())


def matrix_formats(folder: Path) -> dict[str, str]:
    """The dtype or quantized format of each matrix that `load` returns."""
    return {
        name: _format(entry["type"])
        for name, entry in _read_index(folder).items()
        if len(entry["shape"]) > 1
    }


def stored_types(folder: Path) -> list[str]:
    """The GGUF types of the matrices, the most frequent one first.

    Raises:
        ModelError: the index is damaged.
    """
    sizes: Counter[str] = Counter()
    for entry in _read_index(folder).values():
        if len(entry["shape"]) > 1:
            sizes[entry["type"]] += int(np.prod(entry["shape"], dtype=np.int64))
    return [kind for kind, _ in sizes.most_common()]


def load(folder: Path, config: LlamaConfig) -> dict[str, Weight]:
    """Map the tensors, by their names in a Llama checkpoint, without the leading "model.".

    Raises:
        ModelError: the file or its index is damaged.
    """
    index = _read_index(folder)
    try:
        data = np.memmap(folder / FILE, np.uint8, mode="r").view(np.ndarray)
        return {name: _tensor(name, entry, data, config) for name, entry in index.items()}
    except (OSError, ValueError, IndexError) as exc:
        raise ModelError(f"{folder / FILE} does not match {INDEX}: {exc}") from exc


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / INDEX
    try:
        tensors = json.loads(path.read_text("utf-8"))["tensors"]
        for entry in tensors.values():
            if not (str(entry["type"]) and tuple(entry["shape"]) and int(entry["offset"]) >= 0):
                raise ValueError(f"invalid entry {entry}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{path} is damaged: {exc}; remove the model and pull it again") from exc
    return dict(tensors)


def _format(kind: str) -> str:
    if kind in READ_AS:
        return READ_AS[kind]
    return DTYPES.get(kind, "float32")


def _tensor(name: str, entry: Mapping[str, Any], data: Array, config: LlamaConfig) -> Weight:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[entry["type"]]
    *outer, inner = entry["shape"]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = inner // block * block_bytes
    num_bytes = int(np.prod(outer, dtype=np.int64)) * row_bytes
    rows = data[entry["offset"] : entry["offset"] + num_bytes].reshape(*outer, row_bytes)
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    for part, num_heads in heads.items():
        if f"{part}.weight" in name:
            rows = unpermuted(rows, num_heads)
    if entry["type"] in DTYPES:
        return rows.view(numpy_dtype(DTYPES[entry["type"]]))
    if entry["type"] not in READ_AS:
        return dequantize(rows, kind)
    blocks = rows.reshape(*outer, inner // GROUP, -1)
    if entry["type"] == "Q5_0":
        blocks = _q8_0_of_q5_0(blocks)
    assert blocks.shape[-1] == BLOCK_BYTES[READ_AS[entry["type"]]]
    return QuantizedMatrix(READ_AS[entry["type"]], blocks)


def unpermuted(weight: Array, num_heads: int) -> Array:
    """Undo llama.cpp's interleaving of the two halves of each head's rows."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _q8_0_of_q5_0(blocks: Array) -> Array:
    """The same weights, d * (q - 16), with a byte for each integer."""
    high = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little") << 4
    nibbles = blocks[..., 6:]
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    return np.concatenate([blocks[..., :2], (low | high) - np.uint8(16)], axis=-1)
