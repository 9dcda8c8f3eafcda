"""The native kernels: selecting and loading a library, and what it computes."""

import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from kernel_tools import native_kernels
from safetensors.torch import load_file

from smolcli.engine.autoconfig import resolve_config
from smolcli.engine.config import LlamaConfig
from smolcli.engine.dtypes import numpy_dtype
from smolcli.engine.interfaces import Model
from smolcli.engine.native import library
from smolcli.engine.native.bindings import (
    BYTEWISE,
    PAIRWISE,
    Array,
    KernelError,
    Kernels,
    ThreadTeam,
    aligned_empty,
    load_kernels,
)
from smolcli.engine.native.model import NativeModel
from smolcli.engine.native.packing import (
    INTEGER_FORMATS,
    interleave,
    kv_limits,
    pack_into,
    packed_layout,
    row_lengths,
    split_heads,
)
from smolcli.engine.quantized import (
    BLOCK_FORMATS,
    GROUP,
    QuantizedMatrix,
    Weight,
    as_array,
    formats_of,
    quantized_as,
)
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.engine.torch_ops.model import TorchHead, TorchModel
from smolcli.errors import BackendError, UsageError
from smolcli.settings import EngineSettings, ResolvedDtype
from smolcli.weights.loader import load_config, load_model

FLOAT = EngineSettings(dtype="float32")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return native_kernels("float32")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the libraries and sources, none of which is loaded yet."""
    for path in library.FOLDER.iterdir():
        if path.suffix in (".c", ".h", ".so", ".dylib", ".dll"):
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    load_kernels.cache_clear()
    yield tmp_path
    load_kernels.cache_clear()


def find_library(folder: Path) -> Path:
    [path] = folder.glob("libsmol-*-float32.*")
    return path


def test_missing_libraries_are_an_error_that_says_how_to_build_them(folder: Path) -> None:
    find_library(folder).unlink()
    with pytest.raises(KernelError, match=r"are not built .*: build them with `python -m tools"):
        load_kernels("float32")


def test_libraries_older_than_their_source_are_rejected(folder: Path) -> None:
    with (folder / "kernels.c").open("a") as source:
        source.write("/* changed */\n")
    with pytest.raises(KernelError, match="older than their source: build them with"):
        load_kernels("float32")


def test_a_library_that_cannot_be_loaded_is_an_error_that_says_why(folder: Path) -> None:
    find_library(folder).write_bytes(b"not a library")
    with pytest.raises(KernelError, match="cannot load the native kernels"):
        load_kernels("float32")


def test_an_installation_without_sources_loads_its_libraries(folder: Path) -> None:
    for name in library.SOURCES:
        (folder / name).unlink()
    assert load_kernels("float32").weight_dtype == np.float32


def test_a_variant_can_be_forced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIANT_VARIABLE, "vax")
    with pytest.raises(KernelError, match="SMOL_KERNEL_VARIANT=vax has no float32 kernels"):
        load_kernels("float32")


@pytest.mark.parametrize(
    ("bits", "float32", "bfloat16"),
    [
        (1, "x86-64-v3", "x86-64-v3"),
        (3, "x86-64-v4", "x86-64-v4"),
        (7, "x86-64-v4", "x86-64-v4-bf16"),
        (8, "aarch64", "aarch64"),
        (24, "aarch64", "aarch64-bf16"),
        (0, None, None),
    ],
)
def test_best_supported_variant_is_selected(
    bits: int, float32: str | None, bfloat16: str | None
) -> None:
    found = [library.best_variant(dtype, bits) for dtype in ("float32", "bfloat16")]
    assert [variant and variant.name for variant in found] == [float32, bfloat16]


def test_torch_is_used_without_kernels(folder: Path, tiny_folder: Path) -> None:
    find_library(folder).unlink()
    config = resolve_config(FLOAT, load_config(tiny_folder))
    assert config.kernels is None
    assert "are not built" in config.unsupported_reason


def test_torch_is_used_for_unsupported_shapes(
    kernels: Kernels, tiny_folder: Path, tmp_path: Path
) -> None:
    text = (tiny_folder / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(text.replace('"head_dim": 32', '"head_dim": 36'))
    config = resolve_config(FLOAT, load_config(tmp_path))
    assert config.kernels is None
    assert config.unsupported_reason == f"head_dim 36 is not a multiple of {2 * kernels.width}"


def tiny_config(tiny_folder: Path) -> LlamaConfig:
    return replace(load_config(tiny_folder), vocab_size=70)


def random_weights(config: LlamaConfig) -> dict[str, Array]:
    """Weights of a Llama whose values bfloat16 represents exactly."""
    source = np.random.default_rng(1)
    inner, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    for index in range(config.num_layers):
        layer = f"layers.{index}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (inner, hidden),
            f"{layer}self_attn.k_proj.weight": (kv, hidden),
            f"{layer}self_attn.v_proj.weight": (kv, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, inner),
            f"{layer}mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, intermediate),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return {
        name: (0.2 * source.standard_normal(shape))
        .astype(numpy_dtype("bfloat16"))
        .astype(np.float32)
        for name, shape in shapes.items()
    }


def test_packing_keeps_every_weight(kernels: Kernels, tiny_folder: Path) -> None:
    config = tiny_config(tiny_folder)
    weights = random_weights(config)
    layout = packed_layout(config, kernels)
    buffer = aligned_empty((layout.num_bytes,), np.dtype(np.uint8))
    pack_into(buffer, config, weights, kernels)
    embed = layout.tensors["embed"].view(buffer)
    unpacked = embed.transpose(0, 2, 1, 3).reshape(-1, config.hidden_size)
    assert np.array_equal(unpacked[:70], weights["embed_tokens.weight"])
    assert not unpacked[70:].any()
    layer = layout.tensors["layers.1.down"].view(buffer)
    unpacked = layer.transpose(0, 2, 1, 3).reshape(-1, config.intermediate_size)
    assert np.array_equal(unpacked, weights["layers.1.mlp.down_proj.weight"])


def test_rows_of_gate_and_up_alternate() -> None:
    gate = np.arange(8.0).reshape(4, 2)
    assert interleave(gate, -gate, 2)[:, 0].tolist() == [0, 2, 0, -2, 4, 6, -4, -6]


def test_the_halves_of_a_head_alternate() -> None:
    rows = np.arange(16.0).reshape(16, 1)
    expected = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert split_heads(rows, 8, 2)[:, 0].tolist() == expected


def test_packed_weights_can_be_read_only_and_shared(kernels: Kernels, tiny_folder: Path) -> None:
    """As memory-mapped from a file: the same answers as from weights in memory."""
    config = tiny_config(tiny_folder)
    weights = random_weights(config)
    buffer = aligned_empty((packed_layout(config, kernels).num_bytes,), np.dtype(np.uint8))
    pack_into(buffer, config, weights, kernels)
    buffer.flags.writeable = False
    mapped = NativeModel.from_packed(config, buffer, kernels)
    expected = hidden_states(NativeModel(config, weights, kernels), list(range(3, 43)))
    assert np.array_equal(hidden_states(mapped, list(range(3, 43))), expected)
    with pytest.raises(KernelError, match="bytes instead of"):
        NativeModel.from_packed(config, buffer[:-64], kernels)
    shifted = aligned_empty((len(buffer) + 64,), np.dtype(np.uint8))[4:][: len(buffer)]
    with pytest.raises(KernelError, match="not aligned"):
        NativeModel.from_packed(config, shifted, kernels)


def test_bfloat16_weights_with_float32_arithmetic_equal_float32_weights(tiny_folder: Path) -> None:
    """Bit for bit, if bfloat16 represents the weights exactly."""
    try:
        wide, narrow = load_kernels("float32"), load_kernels("bfloat16")
    except KernelError as exc:
        pytest.skip(str(exc))
    if narrow.dtype != np.float32:
        pytest.skip("this CPU multiplies bfloat16")
    config = tiny_config(tiny_folder)
    weights = random_weights(config)
    seen = [
        hidden_states(NativeModel(config, weights, kernels), list(range(40)))
        for kernels in (wide, narrow)
    ]
    assert np.array_equal(*seen)


@pytest.mark.parametrize("stored", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_give_the_bits_of_expanded_ones(
    dtype: Literal["float32", "bfloat16"], stored: str, tiny_folder: Path
) -> None:
    """In registers for few rows, and through a buffer for many, with and without stealing."""
    kernels = native_kernels(dtype)
    config = tiny_config(tiny_folder)
    weights = quantized_weights(config, stored)
    expanded = {name: as_array(weight) for name, weight in weights.items()}
    prompts = [[7], [8, 9], list(range(3, 9)), list(range(7)), list(range(40))]
    reference = NativeModel(config, expanded, kernels)
    expected = np.concatenate([hidden_states(reference, prompt) for prompt in prompts])
    for num_threads in (1, 3):
        model = NativeModel(config, weights, kernels, num_threads)
        alone = np.concatenate([hidden_states(model, prompt) for prompt in prompts])
        assert np.array_equal(alone, expected), num_threads
        assert np.array_equal(batch_states(model, prompts), expected), num_threads
        logits = model.head.logits(expected)
        assert np.array_equal(logits, reference.head.logits(expected)), num_threads


@pytest.mark.parametrize("stored", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("integers", [PAIRWISE, BYTEWISE])
def test_integer_products_are_those_of_numpy(integers: int, stored: str, tiny_folder: Path) -> None:
    """Bit for bit: inputs are rounded and sums added as documented in int8_products.h."""
    kernels = native_kernels("int8")
    if integers == BYTEWISE and kernels.integers != BYTEWISE:
        pytest.skip("this CPU has no dot products of bytes")
    config = replace(tiny_config(tiny_folder), rms_norm_eps=EPS)
    weights = quantized_weights(config, stored)
    weights["norm.weight"] = np.ones(config.hidden_size, np.float32)
    matrix = weights["embed_tokens.weight"]
    assert isinstance(matrix, QuantizedMatrix)
    source = np.random.default_rng(4)
    x = source.integers(-100, 101, (9, config.hidden_size)).astype(np.float32)
    x[:, :GROUP] *= 2.0 ** source.integers(-12, 4, (9, 1))  # scales of groups differ
    x[1, 5:25] = x[2] = 0
    squares = np.square(x.astype(np.float64)).mean(axis=1, keepdims=True) + np.float32(EPS)
    rms = np.sqrt(squares.astype(np.float32))
    model = NativeModel(config, weights, copy_with(kernels, integers))
    assert np.array_equal(model.head.logits(x), integer_products(x, matrix) * (1 / rms))


EPS = 1e-5


def copy_with(kernels: Kernels, integers: int) -> Kernels:
    """The same kernels with other instructions for integer products."""
    copied = copy(kernels)
    copied.integers = integers
    return copied


def integer_products(x: Array, matrix: QuantizedMatrix) -> Array:
    """x @ matrix.T as `--dtype int8` computes it, in float32 as the kernels round it."""
    is_wide = matrix.format == "Q8_0"
    zero = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}[matrix.format]
    sums = np.zeros((len(x), matrix.shape[0]), np.float32)
    for group in range(matrix.shape[1] // GROUP):
        values = x[:, group * GROUP : (group + 1) * GROUP]
        codes, scale = rounded_wide(values) if is_wide else rounded_narrow(values)
        integers = matrix.codes[:, group].astype(np.int64)
        products = (codes @ (integers - zero).T).astype(np.float32)
        scales = matrix.scales[:, group].astype(np.float32) * scale
        sums = fma(products, scales, sums)
        if matrix.format == "Q4_1":
            totals = scale * codes.sum(axis=1, keepdims=True).astype(np.float32)
            sums = fma(matrix.offsets[:, group].astype(np.float32), totals, sums)
    return sums


def rounded_wide(values: Array) -> tuple[Array, Array]:
    """16-bit codes of a group of inputs, and their scale."""
    largest, levels = np.abs(values).max(axis=1, keepdims=True), np.float32(127 * 256 + 127)
    scale = largest / levels
    inverse = 1 / np.where(scale > 0, scale, np.float32(1))
    return np.rint(values.astype(np.float64) * inverse).astype(np.int64), scale


def rounded_narrow(values: Array) -> tuple[Array, Array]:
    """8-bit codes of a group, multiplied by the multiples of both halves, and their scale."""
    largest, most = np.abs(values).max(axis=1, keepdims=True), np.float32(32767)
    scale = largest / (np.float32(127) * most)
    codes = []
    for half in np.split(values, 2, axis=1):
        ratio = most / np.where(largest > 0, largest, np.float32(1))
        multiple = np.minimum(np.ceil(np.abs(half).max(axis=1, keepdims=True) * ratio), most)
        product = scale * multiple
        inverse = 1 / np.where(product > 0, product, np.float32(np.inf))
        rounded = np.rint(half.astype(np.float64) * inverse).astype(np.int64)
        codes.append(rounded * multiple.astype(np.int64))
    return np.concatenate(codes, axis=1), scale


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c; float64 has room for the product."""
    summed: Array = (a.astype(np.float64) * b + c).astype(np.float32)
    return summed


def test_the_kv_cache_of_integer_products_has_16_bits(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, "int8", "cpu", native_kernels("int8"))
    cache, sequence = model.make_kv_cache(0), Sequence([3, 4, 5])
    sequence.max_tokens = native_kernels("int8").panel
    assert cache.bytes_needed(sequence) == model.config.kv_cache_bytes(sequence.max_tokens, 2)


@pytest.mark.parametrize("sharpness", [0, 1, 8])
def test_attention_in_integers_is_close_to_that_in_float32(
    sharpness: float, tiny_folder: Path
) -> None:
    """Over many blocks of keys, whether queries attend to all of them or to a few."""
    config = replace(tiny_config(tiny_folder), num_layers=1)
    weights = random_weights(config)
    weights["layers.0.self_attn.q_proj.weight"] *= sharpness
    prompt = random.Random(4).choices(range(70), k=400)
    found, expected = (
        hidden_states(NativeModel(config, weights, native_kernels(dtype)), prompt)
        for dtype in ("int8", "float32")
    )
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_no_key_or_value_exceeds_its_limit(tiny_folder: Path) -> None:
    """Inputs along the weights of a channel reach the limits, and no others exceed them."""
    config = tiny_config(tiny_folder)
    shape = (config.num_kv_heads * config.head_dim, config.hidden_size)
    source = np.random.default_rng(5)
    keys, values = source.standard_normal((2, *shape)).astype(np.float32)
    norm = source.standard_normal(config.hidden_size).astype(np.float32)
    key_limits, value_limits = kv_limits(keys, values, norm, config).reshape(2, -1)
    inputs = np.concatenate([keys * norm, values * norm, source.standard_normal(shape)])
    inputs /= np.sqrt(np.square(inputs).mean(axis=1, keepdims=True))
    reached = np.abs(inputs * norm @ values.T).max(axis=0)
    assert (reached <= value_limits).all()
    assert (reached > 0.97 * value_limits).all()
    halves = (inputs * norm @ keys.T).reshape(len(inputs), -1, 2, config.head_dim // 2)
    rotated = np.hypot(halves[:, :, 0], halves[:, :, 1]).max(axis=0)  # at the worst position
    limits = key_limits.reshape(-1, 2, config.head_dim // 2)
    assert (rotated[:, None] <= limits).all()
    assert (rotated[:, None] > 0.5 * limits).all()


def test_a_channel_of_zeros_has_no_scale_but_works(tiny_folder: Path) -> None:
    config = tiny_config(tiny_folder)
    weights = random_weights(config)
    weights["layers.1.self_attn.k_proj.weight"][:] = 0
    weights["layers.1.self_attn.v_proj.weight"][3] = 0
    found, expected = (
        hidden_states(NativeModel(config, weights, native_kernels(dtype)), [5, 6, 7])
        for dtype in ("int8", "float32")
    )
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("stored", [None, "Q4_K", "Q5_K", "Q6_K"])
def test_int8_quantizes_other_matrices(stored: str | None, tiny_folder: Path) -> None:
    """Also those that are packed together from different formats; norms stay as they are."""
    kernels, config = native_kernels("int8"), tiny_config(tiny_folder)
    weights = quantized_weights(config, stored) if stored else random_weights(config)
    layout = packed_layout(config, kernels, formats_of(weights)).tensors
    matrices = [layout["embed"], layout["layers.0.qkv"], layout["layers.0.down"]]
    assert {tensor.format for tensor in matrices} == {"Q8_0"}
    assert layout["norm"].format == "dense"
    exact = {name: as_array(weight) for name, weight in weights.items()}
    rounded = {
        name: as_array(quantized_as("Q8_0", weight)) if weight.ndim > 1 else as_array(weight)
        for name, weight in weights.items()
    }
    assert all(np.allclose(rounded[n], w, atol=np.abs(w).max() / 250) for n, w in exact.items())
    found = hidden_states(NativeModel(config, weights, kernels), [3, 4, 5])
    expected = hidden_states(NativeModel(config, rounded, native_kernels("float32")), [3, 4, 5])
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_int8_needs_native_kernels(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Shapes and devices that they do not support are an error, not slower and more exact."""
    text = (tiny_folder / "config.json").read_text("utf-8")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(
        text.replace('"intermediate_size": 96', '"intermediate_size": 80')
    )
    given = EngineSettings(dtype="int8")
    with pytest.raises(UsageError, match=r"dtype int8 is not available: .*multiples of 32; use"):
        resolve_config(given, load_config(odd))
    assert resolve_config(given, load_config(tiny_folder)).dtype == "int8"
    find_library(folder).unlink()
    load_kernels.cache_clear()
    with pytest.raises(UsageError, match=r"dtype int8 is not available: .* are not built"):
        resolve_config(given, load_config(tiny_folder))


@pytest.mark.parametrize(("other", "common"), [("Q8_0", "Q5_K"), ("Q6_K", "dense")])
def test_matrices_of_mixed_formats_get_one_that_holds_them_all(
    kernels: Kernels, other: str, common: str, tiny_folder: Path
) -> None:
    """A fused matrix has one format; llama.cpp stores some layers' values in more bits."""
    config = tiny_config(tiny_folder)
    weights = quantized_weights(config, "Q4_1")
    name = "layers.1.self_attn.v_proj.weight"
    weights[name] = quantized_weights(config, other)[name]
    layout = packed_layout(config, kernels, formats_of(weights)).tensors
    assert (layout["layers.0.qkv"].format, layout["layers.1.qkv"].format) == ("Q4_1", common)
    expanded = {name: as_array(weight) for name, weight in weights.items()}
    seen = [hidden_states(NativeModel(config, w, kernels), [3, 4, 5]) for w in (weights, expanded)]
    assert np.array_equal(*seen)


def quantized_weights(config: LlamaConfig, stored: str) -> dict[str, Weight]:
    """Random weights, the matrices quantized by the gguf package if it can."""
    quantize = k_quantized if stored.endswith("_K") else quantized_by_gguf
    return {
        name: quantize(stored, weight) if weight.ndim > 1 else weight
        for name, weight in random_weights(config).items()
    }


def quantized_by_gguf(stored: str, weight: Array) -> QuantizedMatrix:
    kind = GGMLQuantizationType[stored]
    blocks = quants.quantize(weight, kind).reshape(len(weight), weight.shape[1] // GROUP, -1)
    matrix = QuantizedMatrix(stored, blocks)
    dequantized = quants.dequantize(blocks, kind).reshape(weight.shape)
    assert np.array_equal(as_array(matrix), dequantized)
    return matrix


def k_quantized(stored: str, weight: Array) -> QuantizedMatrix:
    """Scales and offsets are products of a float16 and an integer, as in GGUF."""
    layout = BLOCK_FORMATS[stored]
    groups = weight.reshape(len(weight), -1, layout.size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    offsets = (low / 41).astype(np.float16).astype(np.float32) * 41 * layout.has_offsets
    most = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 31}[stored]
    reach = high - low if layout.has_offsets else np.maximum(high, -low)
    scales = (reach / most / -37).astype(np.float16).astype(np.float32) * -37
    codes = np.rint((groups - offsets[..., None]) / scales[..., None])
    codes = codes.clip(-32 if layout.zero else 0, most) + layout.zero
    given = offsets if layout.has_offsets else None
    matrix = QuantizedMatrix.of(stored, scales, codes.astype(np.uint8), given)
    assert np.allclose(as_array(matrix), weight, atol=0.1 * np.abs(weight).max())
    return matrix


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", None), ("bfloat16", None), ("int8", None), ("int8", "Q4_1")],
)
def test_batch_size_and_threads_change_no_bit(
    dtype: ResolvedDtype, stored: str | None, tiny_folder: Path
) -> None:
    """From 1 to 128 sequences, with 1, 2, 3 and 5 threads: one set of hidden states."""
    kernels = native_kernels(dtype)
    config = tiny_config(tiny_folder)
    weights = quantized_weights(config, stored) if stored else random_weights(config)
    source = random.Random(2)
    prompts = [source.choices(range(70), k=source.randint(1, 90)) for _ in range(128)]
    alone = NativeModel(config, weights, kernels)
    expected = np.stack([hidden_states(alone, prompt)[0] for prompt in prompts])
    for num_threads in (1, 2, 3, 5):
        model = NativeModel(config, weights, kernels, num_threads)
        for size in (128, 33, 8):
            rows = [
                batch_states(model, prompts[start : start + size])
                for start in range(0, len(prompts), size)
            ]
            assert np.array_equal(np.concatenate(rows), expected), (num_threads, size)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_splitting_a_prompt_changes_no_bit(dtype: ResolvedDtype, tiny_folder: Path) -> None:
    """A long prompt computed at once, in chunks, and token by token, across blocks of keys."""
    config = tiny_config(tiny_folder)
    model = NativeModel(config, random_weights(config), native_kernels(dtype), 2)
    source = random.Random(3)
    prompt = source.choices(range(70), k=211)
    expected = hidden_states(model, prompt)
    for size in (1, 7, 64, 100):
        cache, sequence = model.make_kv_cache(0), Sequence(prompt)
        cache.allocate(sequence)
        for start in range(0, len(prompt), size):
            stop = min(start + size, len(prompt))
            work = ScheduledSequence(sequence, start, stop)
            states = model.forward(cache.make_batch([work]))
        assert np.array_equal(states, expected), size


def batch_states(model: NativeModel, prompts: list[list[int]]) -> Array:
    """Hidden states after the last token of each prompt, computed in one step."""
    cache, works = model.make_kv_cache(0), []
    for prompt in prompts:
        cache.allocate(sequence := Sequence(prompt))
        works.append(ScheduledSequence(sequence, 0, len(prompt)))
    return model.forward(cache.make_batch(works))


def test_threads_that_cannot_be_started_end_in_an_error_for_users(kernels: Kernels) -> None:
    """Under a limit on processes, smol ended with a traceback."""
    with pytest.raises(BackendError, match="cannot start 1025 threads; lower the number"):
        ThreadTeam(kernels, 1025)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_computes_with_a_new_team(kernels: Kernels, tiny_folder: Path) -> None:
    config = tiny_config(tiny_folder)
    model = NativeModel(config, random_weights(config), kernels, 2)
    expected = hidden_states(model, [1, 2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(hidden_states(model, [1, 2, 3]), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_exits_during_a_step(deep_folder: Path) -> None:
    """After a second Ctrl-C, `smol run` destroyed the team during a step, and never exited."""
    code = f"""
import threading
from pathlib import Path
from smolcli.engine.native.bindings import load_kernels
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.weights.loader import load_model

model = load_model(Path({str(deep_folder)!r}), "float32", "cpu", load_kernels("float32"), 2)
cache, sequence = model.make_kv_cache(0), Sequence([5] * 500)
cache.allocate(sequence)
cache.ensure_capacity(sequence)
batch = cache.make_batch([ScheduledSequence(sequence, 0, 500)])
is_running = threading.Event()

def compute():
    is_running.set()
    while True:
        model.forward(batch)

threading.Thread(target=compute, daemon=True).start()
is_running.wait()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_activations_of_any_size_are_computed(kernels: Kernels, tiny_folder: Path) -> None:
    """The exponential in SiLU once overflowed below -88 and gave garbage."""
    config, weights = load_config(tiny_folder), load_file(tiny_folder / "model.safetensors")
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    large = {n: w * 1000 if "gate_proj" in n else w for n, w in weights.items()}
    ours = NativeModel(config, {n: w.numpy() for n, w in large.items()}, kernels)
    theirs = TorchModel(config, large, torch.float32, torch.device("cpu"))
    ids = list(range(5, 45))
    found, expected = (torch.as_tensor(hidden_states(model, ids)) for model in (ours, theirs))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def hidden_states(model: Model, token_ids: list[int]) -> Any:
    """Hidden states after the last token."""
    cache, sequence = model.make_kv_cache(0), Sequence(token_ids)
    cache.allocate(sequence)
    cache.ensure_capacity(sequence)
    return model.forward(cache.make_batch([ScheduledSequence(sequence, 0, len(token_ids))]))


def test_unwanted_hidden_states_change_no_others(kernels: Kernels, tiny_folder: Path) -> None:
    """The last layer computes only the rows that are wanted; these have the same bits as always."""
    model = load_model(tiny_folder, "float32", "cpu", kernels)
    assert isinstance(model, NativeModel)
    prompts = [list(range(1, 61)), [7, 8, 9], list(range(5, 45))]
    cache, sequences = model.make_kv_cache(0), [Sequence(prompt) for prompt in prompts]
    for sequence in sequences:
        cache.allocate(sequence)
    batch = cache.make_batch([ScheduledSequence(s, 0, len(s.token_ids)) for s in sequences])
    batch.spans["num_hidden"] = 60, 3, 40
    whole = model.forward(batch)
    batch.spans["num_hidden"] = 2, 0, 37
    few = model.forward(batch)
    batch.spans["num_hidden"] = 0
    none = model.forward(batch)
    assert whole.shape == (103, model.config.hidden_size)
    assert np.array_equal(few, np.concatenate([whole[58:60], whole[66:]]))
    assert len(none) == 0


def test_native_and_torch_heads_agree(kernels: Kernels, tiny_folder: Path) -> None:
    """Scores of the whole vocabulary, and the best of them, are those that torch computes."""
    ours = load_model(tiny_folder, "float32", "cpu", kernels)
    assert isinstance(ours, NativeModel)
    theirs = load_model(tiny_folder, "float32").head
    assert isinstance(theirs, TorchHead)
    hidden = torch.randn(37, ours.config.hidden_size, generator=torch.Generator().manual_seed(1))
    logits = ours.head.logits(hidden.numpy())
    assert np.allclose(logits, theirs.logits(hidden), atol=1e-4)
    best = ours.head.best(hidden.numpy())
    assert best == theirs.best(hidden) == logits.argmax(-1).tolist()
    masks = [None if n % 3 == 0 else random.Random(n).randbytes(48) for n in range(37)]
    allowed = ours.head.best(hidden.numpy(), masks)
    assert allowed == theirs.best(hidden, masks)
    assert allowed[::3] == best[::3]
    assert allowed != best


@pytest.mark.parametrize("stored", INTEGER_FORMATS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_bounds_of_logits_exclude_no_largest_one(
    stored: str, num_threads: int, tiny_folder: Path
) -> None:
    """Near ties, ties, masks, and hidden states of all sizes."""
    config = replace(tiny_config(tiny_folder), vocab_size=300)
    weights = quantized_weights(config, stored)
    matrix = weights["embed_tokens.weight"]
    assert isinstance(matrix, QuantizedMatrix)
    source = np.random.default_rng(5)
    codes = matrix.codes[source.integers(0, 20, 300)]  # rows of few kinds
    codes[::3, 0, :2] ^= source.integers(0, 2, (100, 2), dtype=np.uint8)  # almost
    offsets = matrix.offsets if matrix.layout.has_offsets else None
    similar = QuantizedMatrix.of(stored, matrix.scales[:1].repeat(300, 0), codes, offsets)
    weights["embed_tokens.weight"] = similar
    model = NativeModel(config, weights, native_kernels("float32"), num_threads)
    hidden = source.standard_normal((40, config.hidden_size)).astype(np.float32)
    hidden *= 10.0 ** source.integers(-30, 18, (40, 1))
    hidden[5] = 0
    hidden[6, 3:40] = 0
    hidden[7, 9] = 1e6
    logits = model.head.logits(hidden)
    masks = [None if n % 3 == 0 else random.Random(n).randbytes(38) for n in range(40)]
    assert model.head.best(hidden) == logits.argmax(-1).tolist()
    for row, mask in zip(logits, masks, strict=True):
        if mask is not None:
            row[
                np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:300] == 0
            ] = -np.inf
    assert model.head.best(hidden, masks) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("stored", INTEGER_FORMATS)
def test_lengths_that_bound_logits_are_those_of_the_weights(stored: str, tiny_folder: Path) -> None:
    matrix = quantized_weights(tiny_config(tiny_folder), stored)["embed_tokens.weight"]
    assert isinstance(matrix, QuantizedMatrix)
    lengths, of_terms = row_lengths(matrix, 16)
    assert lengths.shape == (5,)  # of 70 rows
    rows = np.linalg.norm(matrix.dequantized(), axis=1)
    expected = [rows[first : first + 16].max() for first in range(0, 70, 16)]
    assert np.allclose(lengths, expected, rtol=1e-3)
    assert (lengths >= expected).all()
    assert (of_terms >= lengths).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_nan_is_an_error(dtype: ResolvedDtype, tiny_folder: Path) -> None:
    model = load_model(tiny_folder, dtype, "cpu", native_kernels(dtype))
    hidden = np.ones((3, model.config.hidden_size), np.float32)
    hidden[1] = np.nan
    with pytest.raises(FloatingPointError):
        model.head.best(hidden)


def test_a_single_nan_logit_is_an_error(kernels: Kernels, tiny_folder: Path) -> None:
    """NaN compares false with everything, so it was once silently ignored."""
    config = tiny_config(tiny_folder)
    weights = random_weights(config)
    weights["embed_tokens.weight"][41, 0] = np.nan
    quantized: dict[str, Weight] = dict(quantized_weights(config, "Q4_0"))
    embedding = quantized["embed_tokens.weight"]
    assert isinstance(embedding, QuantizedMatrix)
    scales = embedding.scales.copy()
    scales[41, 0] = np.nan
    quantized["embed_tokens.weight"] = QuantizedMatrix.of("Q4_0", scales, embedding.codes)
    for damaged in (weights, quantized):
        model = NativeModel(config, damaged, kernels)
        for num_rows in (1, 4):
            with pytest.raises(FloatingPointError):
                model.head.best(np.ones((num_rows, config.hidden_size), np.float32))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_earlier_token_that_is_nan_is_noticed(dtype: ResolvedDtype, tiny_folder: Path) -> None:
    """Integers cannot be NaN, so attention in integers once ignored such a token."""
    config = tiny_config(tiny_folder)
    weights: dict[str, Weight] = dict(quantized_weights(config, "Q4_1"))
    embedding = weights["embed_tokens.weight"]
    assert isinstance(embedding, QuantizedMatrix)
    offsets = embedding.offsets.copy()
    offsets[1] = np.nan
    damaged = QuantizedMatrix.of("Q4_1", embedding.scales, embedding.codes, offsets)
    model = NativeModel(config, {**weights, "embed_tokens.weight": damaged}, native_kernels(dtype))
    assert np.isfinite(hidden_states(model, [2, 4, 3])).all()
    if native_kernels(dtype).has_integer_attention:
        with pytest.raises(FloatingPointError, match="keys or values that are not finite"):
            hidden_states(model, [2, 1, 3])
    else:
        assert np.isnan(hidden_states(model, [2, 1, 3])).all()


def test_a_nan_score_is_an_error(kernels: Kernels, tiny_folder: Path) -> None:
    """exp(NaN) was once 0, so that a key with NaN was left out of the softmax."""
    config = tiny_config(tiny_folder)
    weights = random_weights(config)
    # The key of token 1 is infinite, with both signs, and its value is not; other keys are 0.
    embedding, keys = weights["embed_tokens.weight"], weights["layers.0.self_attn.k_proj.weight"]
    embedding[:, 0] = 0
    embedding[1] = 0
    embedding[1, 0] = 1
    keys[:] = 0
    keys[:, 0] = np.where(np.arange(len(keys)) % 2, 3e38, -3e38)
    model = NativeModel(config, weights, kernels)
    assert np.isnan(hidden_states(model, [2, 1, 3])).all()
