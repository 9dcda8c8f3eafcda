"""The weights of a model that is stored as its original GGUF file.

Reading the header of a GGUF file takes longer than starting smol, because it contains the whole
vocabulary, so a small index next to the file holds the offsets of the tensors.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smolcli.engine.config import LlamaConfig
from smolcli.engine.dtypes import FLOAT_DTYPES, numpy_dtype
from smolcli.engine.quantized import BLOCK_FORMATS, Array, QuantizedMatrix, Weight
from smolcli.errors import ModelError
from smolcli.protocol.json_text import parse_json
from smolcli.weights.store import GGUF_FILE, GGUF_INDEX

READ_AS = {  # the kernels' formats that hold those of GGUF without loss
    **{kind: kind for kind in BLOCK_FORMATS},
    "Q5_0": "Q8_0",
    "Q5_1": "Q5_K",
}


def is_in(folder: Path) -> bool:
    """Whether a model directory contains its weights as a GGUF file."""
    return (folder / GGUF_INDEX).is_file() and (folder / GGUF_FILE).is_file()


def write_index(folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index of the GGUF file in a model directory.

    Args:
        folder: the model directory.
        tensors: `type`, such as "Q4_1", `shape`, outermost dimension first, and `offset` in the
            file, by the tensors' names in a Llama checkpoint, without the leading "model.".
    """
    text = json.dumps({"tensors": tensors}, separators=(",", ":"))
    (folder / GGUF_INDEX).write_text(f"{text}\n", "utf-8")


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
        data = np.memmap(folder / GGUF_FILE, np.uint8, mode="r").view(np.ndarray)
        return {name: _tensor(name, entry, data, config) for name, entry in index.items()}
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise ModelError(f"{folder / GGUF_FILE} does not match {GGUF_INDEX}: {exc}") from exc


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / GGUF_INDEX
    try:
        tensors = parse_json(path.read_text("utf-8"))["tensors"]
        for entry in tensors.values():
            if not (str(entry["type"]) and tuple(entry["shape"]) and int(entry["offset"]) >= 0):
                raise ValueError(f"invalid entry {entry}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelError(f"{path} is damaged: {exc}; remove the model and pull it again") from exc
    return dict(tensors)


def _format(kind: str) -> str:
    if kind in READ_AS:
        return READ_AS[kind]
    return FLOAT_DTYPES.get(kind, "float32")


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
    if entry["type"] in FLOAT_DTYPES:
        return rows.view(numpy_dtype(FLOAT_DTYPES[entry["type"]]))
    if entry["type"] not in READ_AS:
        return dequantize(rows, kind)
    return _matrix(entry["type"], rows.reshape(*outer, inner // block, block_bytes))


def unpermuted(weight: Array, num_heads: int) -> Array:
    """Undo llama.cpp's interleaving of the two halves of each head's rows."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _matrix(kind: str, blocks: Array) -> QuantizedMatrix:
    """The same weights in the kernels' format for a GGUF type, `READ_AS`.

    The fields of a block: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.

    Args:
        kind: the type.
        blocks: (rows, blocks, bytes of a block) uint8.
    """
    from gguf.quants import Q4_K

    flat, offsets = blocks.reshape(-1, blocks.shape[-1]), None
    match kind:
        case "Q5_0":
            scales = _float32(flat[:, :2])
            codes = _unpacked(flat[:, 6:], 4, 16) | _unpacked(flat[:, 2:6], 1, 1) << 4
            codes += 128 - 16
        case "Q5_1":
            scales, offsets = _float32(flat[:, :2]), _float32(flat[:, 2:4])
            codes = _unpacked(flat[:, 8:], 4, 16) | _unpacked(flat[:, 4:8], 1, 1) << 4
        case "Q4_K" | "Q5_K":
            factors, minima = Q4_K.get_scale_min(flat[:, 4:16])
            scales, offsets = _float32(flat[:, :2]) * factors, -_float32(flat[:, 2:4]) * minima
            codes = _unpacked(flat[:, -128:], 4, 32)
            if kind == "Q5_K":
                codes |= _unpacked(flat[:, 16:48], 1, 32) << 4
        case "Q6_K":
            scales = _float32(flat[:, 208:]) * flat[:, 192:208].view(np.int8)
            codes = _unpacked(flat[:, :128], 4, 64) | _unpacked(flat[:, 128:192], 2, 32) << 4
            codes += 128 - 32
        case _:
            return QuantizedMatrix(kind, blocks)
    shape = (len(blocks), -1)
    if offsets is not None:
        offsets = offsets.reshape(shape)
    codes = codes.reshape(*shape, BLOCK_FORMATS[READ_AS[kind]].size)
    return QuantizedMatrix.of(READ_AS[kind], scales.reshape(shape), codes, offsets)


def _float32(data: Array) -> Array:
    """Float16 values from their bytes."""
    return data.view(np.float16).astype(np.float32)


def _unpacked(data: Array, bits: int, run: int) -> Array:
    """Integers of a few bits, (blocks, integers); the lowest bits of `run` bytes come first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = data.reshape(len(data), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return parts.reshape(len(data), -1)
