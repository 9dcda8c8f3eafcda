"""Converting a GGUF file restores the model it was made from."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from gguf_file import write_gguf
from model_stores import entries

from smolcli.errors import ModelError
from smolcli.weights.resolve import resolve

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="session")
def converted(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str]]:
    """The tiny .gguf file, resolved once: SMOL_HOME, the converted directory, the notifications."""
    home, lines = tmp_path_factory.mktemp("home"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOL_HOME", str(home))
        return home, resolve(str(tiny_gguf), lines.append).folder, lines


def test_gguf_file_is_converted_once(
    converted, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder, lines = converted
    assert lines == ["converting tiny.gguf (needed once)"]
    monkeypatch.setenv("SMOL_HOME", str(home))
    renamed = shutil.copy(tiny_gguf, tmp_path / "other.GGUF")
    again = resolve(str(renamed), lines.append)
    assert (again.folder, again.source, len(lines)) == (folder, "gguf", 1)
    assert again.revision == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert entries(home) == [f"gguf--{again.revision}"]


def test_converted_weights_equal_the_originals_in_bfloat16(converted, tiny_folder: Path) -> None:
    from safetensors.torch import load_file

    original = load_file(tiny_folder / "model.safetensors")
    weights = load_file(converted[1] / "model.safetensors")
    assert weights.keys() == original.keys()
    for name, weight in weights.items():
        assert weight.equal(original[name].bfloat16()), name


def test_converted_config_is_clean(converted) -> None:
    """A float32 1e-05 in GGUF once became 9.999999747378752e-06, and its title a path."""
    folder = converted[1]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["rms_norm_eps"] == 1e-05
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["max_position_embeddings"] == 512
    assert config["tie_word_embeddings"] is True
    assert "_model_name_or_path" not in config
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert tokenizer["bos_token"] == "<|im_start|>"
    assert tokenizer["model_max_length"] == 512
    record = json.loads((folder / "smol.json").read_text("utf-8"))
    assert set(record) == {"model", "source", "revision", "sha256", "created_with"}
    assert set(record["created_with"]) == {"smolcli", "transformers", "gguf", "torch"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "all files have the same permissions"


def test_converted_tokenizer_splits_digits(converted, tiny_folder: Path) -> None:
    """transformers reads `tokenizer.ggml.pre` smollm as gpt-2, which splits "a  1" differently."""
    from tokenizers import Tokenizer

    original = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(converted[1] / "tokenizer.json"))
    for text in ["a  1", "In 1234 days, there's  a café.\n\nOk", "   3.14159   ", "<|im_end|>\n7"]:
        assert tokenizer.encode(text).ids == original.encode(text).ids, text
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


def test_invalid_gguf_file_leaves_nothing_in_the_store(
    tiny_gguf: Path, tiny_folder: Path, tmp_path: Path, home: Path
) -> None:
    truncated, garbage, partial = (
        tmp_path / f"{name}.gguf" for name in ("truncated", "garbage", "partial")
    )
    truncated.write_bytes(tiny_gguf.read_bytes()[: tiny_gguf.stat().st_size // 2])
    garbage.write_bytes(b"not a model" * 100)
    write_gguf(partial, tiny_folder, omit="layers.1.mlp.up_proj")
    for path in (truncated, garbage, partial):
        with pytest.raises(ModelError, match=f"cannot convert .*{path.name}: "):
            resolve(str(path))
    assert entries(home) == []
