"""Loading a model directory, and the errors for directories that cannot be loaded."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from smolcli.errors import ModelError
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.weights.checkpoint import load_weights, weight_files
from smolcli.weights.loader import load_config, load_model
from smolcli.weights.store import missing_file


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_eos_ids_are_merged_from_both_configs(folder: Path) -> None:
    change(folder, eos_token_id=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}', "utf-8")
    assert load_config(folder).eos_ids == {0, 2}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ],
)
def test_unsupported_model_is_rejected(folder: Path, values: dict[str, Any], words: str) -> None:
    change(folder, **values)
    with pytest.raises(ModelError, match=words):
        load_config(folder)


def test_older_config_format_is_accepted(folder: Path) -> None:
    change(folder, rope_parameters=None, rope_theta=100000.0)
    assert load_config(folder).rope_theta == 100000.0


def test_truncated_weights_are_rejected(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged or unreadable"):
        load_model(folder, "float32")


def test_weights_of_another_shape_are_rejected(folder: Path) -> None:
    change(folder, num_attention_heads=4)
    with pytest.raises(
        ModelError, match=r"q_proj.weight has the shape \[192, 96\], .* requires \[128, 96\]"
    ):
        load_model(folder, "float32")


def test_missing_tensor_is_named(folder: Path) -> None:
    change(folder, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"layers\.3"):
        load_model(folder, "float32")


def test_missing_config_key_is_named(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text("utf-8"))
    del values["hidden_size"]
    path.write_text(json.dumps(values), "utf-8")
    with pytest.raises(ModelError, match="hidden_size"):
        load_config(folder)


@pytest.mark.parametrize(
    "values",
    [
        *({"intermediate_size": size} for size in (48, 192, 0, -96)),
        *({"hidden_size": size} for size in (48, 192, 0)),
        *({"head_dim": size} for size in (16, 64)),
        *({"num_attention_heads": size} for size in (2, 12)),
        *({"num_key_value_heads": size} for size in (1, 3, 6)),
        *({"num_hidden_layers": size} for size in (2, 4, 0)),
        *({"vocab_size": size} for size in (300, 400, 0)),
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_config_that_contradicts_the_weights_is_rejected(
    folder: Path, values: dict[str, Any]
) -> None:
    """Sizes were once not compared, which ended in a segmentation fault or garbage output."""
    change(folder, **values)
    with pytest.raises(ModelError, match=r"tensor|multiple|must be"):
        load_weights(folder, load_config(folder))


def save(folder: Path, **changes: np.ndarray) -> None:
    """Save the weights again with some tensors added or replaced."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | changes, path)


def test_unknown_tensor_is_rejected(folder: Path) -> None:
    save(folder, **{"model.layers.0.self_attn.q_proj.bias": np.ones(192, np.float32)})
    with pytest.raises(ModelError, match=r"q_proj\.bias, which smol does not support"):
        load_weights(folder, load_config(folder))


def test_buffers_of_older_versions_are_ignored(folder: Path) -> None:
    save(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)})
    weights = load_weights(folder, load_config(folder))
    assert not any("rotary" in name for name in weights)


def test_integer_weights_are_rejected(folder: Path) -> None:
    save(folder, **{"model.norm.weight": np.ones(96, np.int8)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as I8"):
        load_weights(folder, load_config(folder))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 1], ids=["aligned", "unaligned"])
def test_weights_are_mapped_in_the_dtype_they_are_stored_in(
    folder: Path, dtype: Any, padding: int
) -> None:
    path = folder / "model.safetensors"
    expected = {name: array.astype(dtype) for name, array in load_file(path).items()}
    save_file(expected, path)
    content = path.read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    new_size = (header_size + padding).to_bytes(8, "little")
    header, data = content[8 : 8 + header_size], content[8 + header_size :]
    path.write_bytes(new_size + header + b" " * padding + data)
    weights = load_weights(folder, load_config(folder))
    for name, array in expected.items():
        mapped = weights[name.removeprefix("model.")]
        assert isinstance(mapped, np.ndarray)
        assert mapped.dtype == dtype
        assert mapped.tobytes() == array.tobytes()
        assert mapped.flags.aligned
        assert padding or not mapped.flags.writeable


def test_weights_in_another_layout_are_ignored(folder: Path) -> None:
    """Mistral's repositories hold the weights again, as consolidated.safetensors."""
    save_file({"tok_embeddings.weight": np.ones((2, 2))}, folder / "consolidated.safetensors")
    assert "norm.weight" in load_weights(folder, load_config(folder))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_is_a_model_error(
    tiny_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    content = bytearray((tiny_folder / "model.safetensors").read_bytes())
    header_size = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 8 + header_size))
        new = data.draw(st.binary(max_size=4) | st.sampled_from([b"9", b"0", b'"', b"[", b"F16"]))
        content[at : at + len(new)] = new
    (tmp_path / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, 2))] or content)
    with suppress(ModelError):
        load_weights(tmp_path, load_config(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_config_is_a_model_error(
    tiny_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    values = json.loads((tiny_folder / "config.json").read_text("utf-8"))
    for name in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3)):
        values[name] = data.draw(JSON)
    (tmp_path / "config.json").write_text(json.dumps(values), "utf-8")
    shutil.copy(tiny_folder / "model.safetensors", tmp_path)
    with suppress(ModelError):
        load_weights(tmp_path, load_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", load_config),
        ("model.safetensors.index.json", missing_file),
        ("model.safetensors.index.json", weight_files),
        ("tokenizer_config.json", ChatTokenizer.load),
    ],
)
def test_json_that_is_nested_too_deeply_is_an_error(
    name: str, read: Callable[[Path], Any], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ModelError, match=name):
        read(folder)
