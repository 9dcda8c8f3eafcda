"""Loading a model directory, and the errors for directories that cannot be loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from smolcli.errors import ModelError
from smolcli.weights.loader import load_config, load_model


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
    with pytest.raises(ModelError, match="do not fit"):
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
