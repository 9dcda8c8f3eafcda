"""Conversion of GGUF files to model directories.

llama.cpp stores a Llama checkpoint under names of its own, with the rows of query and key
projections permuted, and with the tokenizer as metadata. `convert` writes config.json and the
tokenizer's files as transformers' `save_pretrained` does. A file whose weights are quantized in
formats that the kernels read is kept as it is; other weights are expanded and stored as
safetensors.
"""

import json
import math
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smolcli import __version__
from smolcli.engine.quantized import Array
from smolcli.errors import ModelError
from smolcli.weights import gguf_weights
from smolcli.weights.gguf import GgufFile, GgufTensor, read_gguf
from smolcli.weights.gguf_weights import unpermuted
from smolcli.weights.store import GGUF_FILE, ModelFiles, Notify, install, sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED = 3, 4  # token types

NAMES = {  # llama.cpp's names of tensors, and those of a Llama checkpoint
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

# How text is split before BPE, by llama.cpp's name (`tokenizer.ggml.pre`).
GPT2_SPLIT = ("", "default", "gpt-2")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe")


def add_gguf(gguf: Path, name: str, source: str, scratch: Path, notify: Notify) -> ModelFiles:
    """Install a GGUF file as a model directory in the store.

    The caller holds the store's lock on `name`.

    Args:
        gguf: the file.
        name: the name to store the model under.
        source: where the file came from.
        scratch: an empty directory of the store.
        notify: receives progress messages.

    Raises:
        ModelError: the file is invalid or contains an unsupported model.
    """
    notify(f"preparing {gguf.name} (needed once)")
    files = ModelFiles(name, scratch / "model", sha256_of(gguf), source)
    quantization = convert(gguf, files.folder)
    created_with = {"smolcli": __version__, "gguf": version("gguf"), "numpy": version("numpy")}
    return install(files, created_with, scratch, quantization)


def convert(gguf: Path, folder: Path) -> str:
    """Write the model in a GGUF file to a new directory.

    The file itself is copied if most weights are in formats that the kernels read. Otherwise, the
    weights are expanded to bfloat16.

    Returns:
        The number format of most weights in the GGUF file, such as Q4_1.

    Raises:
        ModelError: the file is invalid or contains an unsupported model.
        OSError: the directory cannot be written.
    """
    try:
        file = read_gguf(gguf)
        config = _config(file)
        tokenizer = _tokenizer(file.metadata)
        names = {name: _checkpoint_name(name) for name in file.tensors}
        is_kept = gguf_weights.is_worth_keeping(_type_sizes(file))
        weights = {} if is_kept else _weights(file, config)
    except Exception as exc:  # damaged metadata can fail anywhere
        raise ModelError(f"cannot convert {gguf}: {_reason(exc)}") from exc
    folder.mkdir()
    special_ids = {key: config[key] for key in GENERATION_KEYS if key in config}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special_ids)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(file.metadata, config))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    if template := file.metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(str(template), "utf-8")
    if is_kept:
        _keep(gguf, file, names, folder)
    else:
        _save(weights, folder / "model.safetensors")
    _check(gguf, folder)
    return _type_sizes(file).most_common(1)[0][0]


def _type_sizes(file: GgufFile) -> Counter[str]:
    """The number of weights in matrices of each type."""
    from gguf import GGMLQuantizationType

    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            sizes[GGMLQuantizationType(tensor.type).name] += math.prod(tensor.shape)
    return sizes


def _keep(gguf: Path, file: GgufFile, names: dict[str, str], folder: Path) -> None:
    """Copy the file into the model directory, and write the index of its tensors."""
    from gguf import GGMLQuantizationType

    shutil.copyfile(gguf, folder / GGUF_FILE)
    index = {
        names[name].removeprefix("model."): {
            "type": GGMLQuantizationType(tensor.type).name,
            "shape": list(tensor.shape),
            "offset": tensor.offset,
        }
        for name, tensor in file.tensors.items()
    }
    gguf_weights.write_index(folder, index)


def _check(gguf: Path, folder: Path) -> None:
    """Load the converted model, which checks all sizes and shapes."""
    from smolcli.weights.checkpoint import load_weights
    from smolcli.weights.loader import load_config

    try:
        load_weights(folder, load_config(folder))
    except ModelError as exc:
        reason = str(exc).removeprefix(f"{folder}: ").replace(f"{folder}/", "")
        raise ModelError(f"cannot convert {gguf}: {reason}") from exc


def _config(file: GgufFile) -> dict[str, Any]:
    """config.json, from the metadata of the file."""
    metadata = file.metadata
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"its architecture is {architecture!r}; smol supports llama")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise ValueError(f"rope scaling {scaling!r} is not supported")
    num_heads, hidden = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": metadata.get("llama.rope.dimension_count") or hidden // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "rms_norm_eps": _decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {
            "rope_theta": _decimal(metadata.get("llama.rope.freq_base", 10000.0)),
            "rope_type": "default",
        },
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": metadata.get("llama.vocab_size", len(metadata["tokenizer.ggml.tokens"])),
    }
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return config | {f"{name}_token_id": i for name, i in sorted(ids.items()) if i is not None}


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _decimal(value: float) -> float:
    """The short decimal that a float32 stands for: 1e-05 rather than 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _tokenizer_config(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {f"{name}_token": config.get(f"{name}_token_id") for name in _SPECIAL}
    return {
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[token_id] for name, token_id in special.items() if token_id is not None},
    }


def _tokenizer(metadata: dict[str, Any]) -> "Tokenizer":
    from tokenizers import AddedToken

    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    kind = metadata["tokenizer.ggml.model"]
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its tokenizer is of type {kind!r}; smol supports gpt2 and llama")
    tokenizer = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
    named = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _SPECIAL.values()}
    typed = list(enumerate(zip(tokens, types, strict=True)))
    special = [token for i, (token, kind) in typed if kind == CONTROL or i in named]
    plain = [token for _, (token, kind) in typed if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    if tokenizer.get_vocab_size() != len(tokens):
        raise ValueError("its vocabulary contains a token twice")
    return tokenizer


def _byte_level(metadata: dict[str, Any]) -> "Tokenizer":
    """Byte-level BPE, as in GPT-2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(_checked(models.BPE, vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match metadata.get("tokenizer.ggml.pre", ""):
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        case name if name in LLAMA3_NAMES:
            split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
            whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
        case name if name in GPT2_SPLIT:
            tokenizer.pre_tokenizer = byte_level
        case name:
            raise ValueError(f"its pre-tokenizer {name!r} is not supported")
    return tokenizer


def _sentencepiece(metadata: dict[str, Any]) -> "Tokenizer":
    """SentencePiece's BPE, as in Llama 2; the file has scores in place of merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
        merges = _merges(vocab, scores)
    tokenizer = Tokenizer(
        _checked(models.BPE, vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    scheme = "first" if has_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that merge into a token, highest score first."""
    found = [
        (token[:cut], token[cut:], score)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    found.sort(key=lambda pair: (vocab[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [(left, right) for left, right, _ in found]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _checked(make: Any, **options: Any) -> Any:
    """Translate the bare Exception that the library raises for a merge of unknown tokens."""
    try:
        return make(**options)
    except Exception as exc:
        raise ValueError(f"its vocabulary is invalid: {exc}") from exc


def _weights(file: GgufFile, config: dict[str, Any]) -> dict[str, Array]:
    """The dequantized tensors, under the names of a Llama checkpoint, in bfloat16."""
    import ml_dtypes
    from gguf import GGMLQuantizationType, dequantize

    weights: dict[str, Array] = {}
    for name, tensor in file.tensors.items():
        values = dequantize(_rows(tensor), GGMLQuantizationType(tensor.type))
        if name.endswith(".attn_q.weight"):
            values = unpermuted(values, config["num_attention_heads"])
        elif name.endswith(".attn_k.weight"):
            values = unpermuted(values, config["num_key_value_heads"])
        weights[_checkpoint_name(name)] = values.astype(ml_dtypes.bfloat16)
    return weights


def _rows(tensor: GgufTensor) -> Array:
    """The data as `gguf.dequantize` expects it: rows of numbers, or of quantized blocks."""
    from gguf import GGMLQuantizationType as Type

    numbers = {Type.F32: np.float32, Type.F16: np.float16, Type.F64: np.float64}
    number = numbers.get(Type(tensor.type), np.uint8)
    return tensor.data.view(number).reshape(*tensor.shape[:-1], -1)


def _checkpoint_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    block, _, part = stem.rpartition(".")
    prefix, _, number = block.partition(".")
    known = NAMES.get(part)
    is_layer = prefix == "blk" and number.isascii() and number.isdigit()
    if suffix != "weight" or known is None or (block and not is_layer):
        raise ValueError(f"it contains the unsupported tensor {name!r}")
    return f"model.layers.{number}.{known}.weight" if is_layer else f"{known}.weight"


def _save(weights: dict[str, Array], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(values) for name, values in weights.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as exc:  # such as a full disk
        raise OSError(str(exc).rpartition(": ")[2]) from exc
    path.chmod((path.parent / "config.json").stat().st_mode)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _reason(exc: BaseException) -> str:
    if isinstance(exc, KeyError):
        return f"its metadata lacks {exc}"
    return " ".join(str(exc).split()) or type(exc).__name__
