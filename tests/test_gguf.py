"""Converting a GGUF file restores the model it was made from."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from gguf_file import add_sentencepiece, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_stores import entries
from safetensors.numpy import load_file

from smolcli.engine.quantized import QuantizedMatrix, as_array
from smolcli.errors import ModelError
from smolcli.weights import gguf_weights
from smolcli.weights.checkpoint import load_weights, weight_formats
from smolcli.weights.gguf import read_gguf
from smolcli.weights.gguf_conversion import convert
from smolcli.weights.loader import load_config
from smolcli.weights.resolve import resolve
from smolcli.weights.store import missing_file, weight_format

pytestmark = pytest.mark.usefixtures("home")


Converted = tuple[Path, Path, list[str]]


@pytest.fixture(scope="session")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The tiny .gguf file, resolved once: SMOL_HOME, the converted directory, the notifications."""
    home, lines = tmp_path_factory.mktemp("home"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOL_HOME", str(home))
        return home, resolve(str(tiny_gguf), lines.append).folder, lines


def test_gguf_file_is_converted_once(
    converted: Converted, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder, lines = converted
    assert lines == ["preparing tiny.gguf (needed once)"]
    monkeypatch.setenv("SMOL_HOME", str(home))
    renamed = shutil.copy(tiny_gguf, tmp_path / "other.GGUF")
    again = resolve(str(renamed), lines.append)
    assert (again.folder, again.source, len(lines)) == (folder, "gguf", 1)
    assert again.revision == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert entries(home) == [f"gguf--{again.revision}"]


def test_converted_weights_equal_the_originals_in_bfloat16(
    converted: Converted, tiny_folder: Path
) -> None:
    from safetensors.torch import load_file as load_tensors

    original = load_tensors(tiny_folder / "model.safetensors")
    weights = load_tensors(converted[1] / "model.safetensors")
    assert weights.keys() == original.keys()
    for name, weight in weights.items():
        assert weight.equal(original[name].bfloat16()), name


def test_converted_config_is_clean(converted: Converted) -> None:
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
    assert set(record) == {
        *("model", "source", "revision", "quantization", "sha256", "created_with")
    }
    assert weight_format(folder) == "bfloat16, from F32"
    assert set(record["created_with"]) == {"smolcli", "gguf", "numpy"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "all files have the same permissions"


def test_converted_tokenizer_splits_digits(converted: Converted, tiny_folder: Path) -> None:
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


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of file sizes")
@pytest.mark.parametrize("failing", ["tokenizer.json", "model.safetensors"])
def test_store_that_cannot_be_written_is_a_model_error(
    converted: Converted, tiny_gguf: Path, home: Path, failing: str
) -> None:
    """The libraries that wrote these files raise exceptions of their own on a full disk."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (converted[1] / failing).stat().st_size - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(ModelError, match=r"cannot write to the model store .*: File too large"):
            resolve(str(tiny_gguf))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert entries(home) == []


TEXTS = ["the theatre in there", "  two  spaces ", "a  1", "12345, 3.14?", "", " "]
TEXTS += ["caf\u00e9 \u65e5\u672c\n\tx"]
TEXTS += ["<think>the</s> <|im_end|>", "The in\u2581the"]


@pytest.mark.parametrize("add_tokenizer", [None, add_sentencepiece], ids=["gpt2", "llama"])
def test_tokenizer_and_config_equal_those_of_transformers(
    tiny_folder: Path, tmp_path: Path, add_tokenizer: Callable[..., None] | None
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf", tiny_folder, add_tokenizer=add_tokenizer)
    convert(tmp_path / "tiny.gguf", tmp_path / "model")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf").backend_tokenizer
    if add_tokenizer is None:  # transformers does not know smollm's split
        original = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
        reference.pre_tokenizer = original.pre_tokenizer
    ours = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        assert ours.decode(ids) == reference.decode(ids), text
    assert ours.get_vocab() == reference.get_vocab()
    assert ours.get_added_tokens_decoder().keys() == reference.get_added_tokens_decoder().keys()

    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf").to_dict()
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    for name in config.keys() - {"architectures", "dtype", "rms_norm_eps", "unk_token_id"}:
        assert config[name] == theirs[name], name


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_equal_the_dequantization_of_the_gguf_package(
    tiny_folder: Path, tmp_path: Path, quantization: str
) -> None:
    """Exactly if the file is kept, rounded to bfloat16 if it is converted."""
    folder = converted_as(quantization, tiny_folder, tmp_path)
    kind = GGMLQuantizationType[quantization]
    weights = load_weights(folder, load_config(folder))
    is_kept = (folder / "model.gguf").exists()
    assert is_kept == quantization.startswith("Q")
    for name, original in load_file(tiny_folder / "model.safetensors").items():
        if original.ndim > 1:
            original = quants.dequantize(quants.quantize(original, kind), kind)
        expected = original if is_kept else original.astype(ml_dtypes.bfloat16)
        assert np.array_equal(as_array(weights[name.removeprefix("model.")]), expected), name


@pytest.mark.parametrize("kind", gguf_weights.READ_AS)
def test_all_blocks_of_a_kept_file_have_the_weights_of_the_gguf_package(
    tiny_folder: Path, tmp_path: Path, kind: str
) -> None:
    """Random bytes, because the package cannot quantize to K-quants; bit for bit."""
    size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = np.random.default_rng(7).integers(0, 256, (30, 2, block_bytes), np.uint8)
    for number in (0, 2, block_bytes - 2):  # where a block may have a float16
        blocks[..., number + 1] &= 0xBF  # which is finite
    (tmp_path / "model.gguf").write_bytes(blocks.tobytes())
    entry = {"type": kind, "shape": [30, 2 * size], "offset": 0}
    gguf_weights.write_index(tmp_path, {"embed_tokens.weight": entry})
    matrix = gguf_weights.load(tmp_path, load_config(tiny_folder))["embed_tokens.weight"]
    assert isinstance(matrix, QuantizedMatrix)
    assert gguf_weights.matrix_formats(tmp_path) == {"embed_tokens.weight": matrix.format}
    expected = quants.dequantize(blocks.reshape(30, -1), GGMLQuantizationType[kind])
    assert matrix.shape == expected.shape
    assert np.array_equal(as_array(matrix).view(np.uint32), expected.view(np.uint32))


def converted_as(quantization: str, tiny_folder: Path, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny_folder, quantization=quantization)
    convert(tmp_path / "tiny.gguf", tmp_path / "model")
    return tmp_path / "model"


def test_quantized_file_is_kept_as_it_came(tiny_folder: Path, tmp_path: Path) -> None:
    folder = converted_as("Q4_1", tiny_folder, tmp_path)
    assert (folder / "model.gguf").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert weight_format(folder) == "Q4_1"
    assert missing_file(folder) is None
    formats = weight_formats(folder, load_config(folder))
    assert set(formats.values()) == {"Q4_1"}
    (folder / "model.gguf.index.json").unlink()
    assert missing_file(folder) == "model.gguf.index.json"


def test_types_of_a_kept_file_are_listed_by_size(tmp_path: Path) -> None:
    """A Q4_K_M file mixes four of them."""
    (tmp_path / "model.gguf").touch()
    tensors = {
        f"{kind}.weight": {"type": kind, "shape": [rows, 256], "offset": 0}
        for kind, rows in (("Q8_0", 3), ("Q6_K", 1), ("Q5_0", 4), ("Q4_K", 2))
    }
    gguf_weights.write_index(tmp_path, tensors)
    assert weight_format(tmp_path) == "Q5_0, Q8_0, Q4_K and Q6_K"


@pytest.mark.parametrize("damage", ["truncate", "index", "type"])
def test_damage_to_a_kept_file_is_a_model_error(
    tiny_folder: Path, tmp_path: Path, damage: str
) -> None:
    folder = converted_as("Q4_1", tiny_folder, tmp_path)
    index = folder / "model.gguf.index.json"
    if damage == "truncate":
        (folder / "model.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:-1000])
    elif damage == "index":
        index.write_text('{"tensors": {"norm.weight": {}}}')
    else:  # as of a newer version of gguf
        index.write_text(index.read_text("utf-8").replace("Q4_1", "Q9_9"), "utf-8")
    with pytest.raises(ModelError, match=r"model\.gguf"):
        load_weights(folder, load_config(folder))


def test_unsupported_contents_are_named(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    for old, new, message in [
        (b"smollm", b"wonder", "pre-tokenizer 'wonder'"),
        (b"gpt2", b"bert", "of type 'bert'"),
        (b"blk.0.attn_norm.weight", b"blk.0.attn_norm.biases", "tensor 'blk.0.attn_norm.biases'"),
        (b"llama.block_count", b"llama.block_kount", "lacks 'llama.block_count'"),
    ]:
        (tmp_path / "changed.gguf").write_bytes(whole.replace(old, new))
        with pytest.raises(ModelError, match=message):
            convert(tmp_path / "changed.gguf", tmp_path / "model")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_is_a_model_error(
    tiny_gguf: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """A length of 2^60 was once trusted, and library exceptions were not translated."""
    whole = bytearray(tiny_gguf.read_bytes())
    size = len(whole) - sum(tensor.data.nbytes for tensor in read_gguf(tiny_gguf).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 900) | st.integers(size - 3000, size))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8))
        whole[at : at + len(new)] = new
    (tmp_path / "damaged.gguf").write_bytes(whole)
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    with suppress(ModelError):
        convert(tmp_path / "damaged.gguf", tmp_path / "model")
