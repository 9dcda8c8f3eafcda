"""A GGUF file made into a `from_pretrained` folder; the one place that imports transformers."""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

from smolcli import __version__
from smolcli.errors import ModelError
from smolcli.weights.store import ModelFiles, Notify, install, sha256_of

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
# How text is cut before BPE, under llama.cpp's names (`tokenizer.ggml.pre`), where transformers
# does not know the name and would cut as gpt-2 does: "  1" then gets other tokens.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    },
}


def add_gguf(gguf: Path, name: str, source: str, scratch: Path, notify: Notify) -> ModelFiles:
    """Put `gguf` converted into the store as `name`; the caller holds the lock and its scratch."""
    notify(f"converting {gguf.name} (needed once)")
    files = ModelFiles(name, scratch / "model", sha256_of(gguf), source)
    created_with = versions()
    convert(gguf, files.folder)
    return install(files, created_with, scratch)


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` to the new `folder`: config, tokenizer and weights in bfloat16.

    Raises:
        ModelError: if it is no GGUF file, or not one that can be converted.
    """
    try:
        pre_tokenizer = PRE_TOKENIZERS.get(_pre(gguf))
        context_length = _save(gguf, folder)
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as exc:
        raise ModelError(f"cannot convert {gguf}: {exc}") from exc
    _edit(folder / "config.json", _tidy_config)
    _edit(folder / "generation_config.json", _tidy_generation)
    _edit(folder / "tokenizer_config.json", lambda values: _tidy_tokenizer(values, context_length))
    if pre_tokenizer is not None:
        _edit(folder / "tokenizer.json", lambda values: values | {"pre_tokenizer": pre_tokenizer})


def versions() -> dict[str, str]:
    """The versions that decide what a conversion makes."""
    found = {"smolcli": __version__}
    for name in ("transformers", "gguf", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError as exc:
            raise ModelError(f"converting a model needs the package {name}") from exc
    return found


def _pre(gguf: Path) -> str:
    """The name of the file's pre-tokenizer."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def _save(gguf: Path, folder: Path) -> int:
    """Convert with transformers; gives the model's context length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import set_verbosity

    set_verbosity(logging.ERROR)
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its type knows one result only
    with redirect_stderr(StringIO()):  # progress bars that cannot be turned off
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model, info = from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ValueError(f"it lacks the weights {', '.join(sorted(info['missing_keys']))}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # saved for their owner's eyes only
        shutil.copymode(folder / "config.json", weights)
    return int(model.config.max_position_embeddings)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    values = change(json.loads(path.read_text("utf-8")))
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _tidy_config(values: dict[str, Any]) -> dict[str, Any]:
    """A GGUF keeps 1e-05 as the float32 9.999999747378752e-06; the short decimal was meant."""
    del values["_model_name_or_path"]  # a name out of the file, where a path or Hub id belongs
    return values | {"rms_norm_eps": float(f"{values['rms_norm_eps']:.6g}")}


def _tidy_generation(values: dict[str, Any]) -> dict[str, Any]:
    """Of settings made up from the config only the token ids mean anything."""
    return {key: value for key, value in values.items() if key.endswith("_token_id")}


def _tidy_tokenizer(values: dict[str, Any], context_length: int) -> dict[str, Any]:
    """Without how it was loaded; `model_max_length` is the model's, not "unlimited"."""
    kept = {k: v for k, v in values.items() if k not in ("is_local", "local_files_only")}
    return kept | {"model_max_length": context_length}
