"""The tiny model as a GGUF file, written as llama.cpp writes SmolLM2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFWriter

Array = np.ndarray[Any, Any]


def write_gguf(
    path: Path,
    folder: Path,
    omit: str = "",
    quantization: str = "F32",
    add_tokenizer: Callable[[Any, Path], None] | None = None,
) -> None:
    """Write a model directory as a GGUF file.

    Args:
        path: the file to write.
        folder: the model directory.
        omit: leave out the tensors whose name contains this.
        quantization: the number format of the matrices.
        add_tokenizer: writes the tokenizer's metadata; None writes that of the directory.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text("utf-8"))
    writer = GGUFWriter(path, "llama")
    writer.add_name("A Tiny Name")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])
    (add_tokenizer or _add_tokenizer)(writer, folder)
    for name, weight in load_file(folder / "model.safetensors").items():
        kind = GGMLQuantizationType[quantization if weight.ndim > 1 else "F32"]
        if not omit or omit not in name:
            data = quants.quantize(_permuted(name, weight, config), kind)
            writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: "GGUFWriter", folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text("utf-8"))


def _gguf_name(name: str) -> str:
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for old, new in renamed.items():
        name = name.replace(old, new)
    return name


def _permuted(name: str, weight: Array, config: dict[str, Any]) -> Array:
    """llama.cpp interleaves the two halves of each rotary head."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape).copy()


def add_sentencepiece(writer: "GGUFWriter", folder: Path) -> None:
    """Add a vocabulary like that of Llama 2: scores in place of merges, spaces as letters."""
    size = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyzTW.,?123",
        "th",
        "the",
        "\u2581the",
        "\u2581t",
        "he",
    ]
    tokens += ["in", "\u2581in", "er", "\u2581\u2581", "re", "an", "<think>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4]
    num_spare = size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"[spare{n}]" for n in range(num_spare)])
    writer.add_token_scores([-float(n) for n in range(size)])
    writer.add_token_types(types + [1] * num_spare)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
