"""Loads a model directory into a model that the engine can run."""

from functools import partial
from pathlib import Path
from typing import Any

from smolcli.engine.autoconfig import ResolvedConfig, resolve_config
from smolcli.engine.config import LlamaConfig
from smolcli.engine.interfaces import Model
from smolcli.engine.native.bindings import Kernels
from smolcli.engine.native.model import NativeModel
from smolcli.engine.quantized import Formats, Weights, as_array
from smolcli.errors import ModelError, error_reason
from smolcli.protocol.json_text import parse_object
from smolcli.settings import EngineSettings, ResolvedDtype
from smolcli.weights.checkpoint import load_weights, weight_formats
from smolcli.weights.packed import packed_weights
from smolcli.weights.store import ModelFiles


def resolve_model_config(settings: EngineSettings, folder: Path) -> ResolvedConfig:
    """Fill in everything that the settings leave open for the model in a directory.

    Raises:
        ModelError: the model cannot be used.
        UsageError: the device is not available.
    """
    config = load_config(folder)
    return resolve_config(settings, config, formats=weight_formats(folder, config))


def load_model(
    folder: Path,
    dtype: ResolvedDtype,
    device: str = "cpu",
    kernels: Kernels | None = None,
    num_threads: int = 1,
    files: ModelFiles | None = None,
    formats: Formats | None = None,
) -> Model:
    """Load a Llama checkpoint in the layout of transformers' `save_pretrained`.

    Args:
        folder: the model directory.
        dtype: the dtype to compute in; int8 only with native kernels.
        device: the device to compute on.
        kernels: the native kernels for `dtype`; None computes with torch.
        num_threads: CPU threads to compute with.
        files: the model that the directory belongs to; if given, the weights that native kernels
            read are packed once and then mapped from the model store.
        formats: the result of `weight_formats`, if it has been called already.

    Raises:
        ModelError: the architecture is not supported, or the files are damaged or inconsistent.
    """
    config = load_config(folder)
    if kernels is not None and files is not None:
        formats = weight_formats(folder, config) if formats is None else formats
        packed = packed_weights(files, config, kernels, formats)
        if packed is not None:
            return NativeModel.from_packed(config, packed, kernels, num_threads, formats)
    weights = load_weights(folder, config)
    if kernels is not None:
        return NativeModel(config, weights, kernels, num_threads)
    return _torch_model(config, weights, dtype, device, num_threads)


def _torch_model(
    config: LlamaConfig, weights: Weights, dtype: str, device: str, num_threads: int
) -> Model:
    try:
        import torch
    except ModuleNotFoundError as exc:
        raise ModelError(
            "the native kernels cannot run this model, and torch is not installed; install torch"
        ) from exc

    from smolcli.engine.torch_ops.cuda_graphs import GraphedModel, record_cuda_graph
    from smolcli.engine.torch_ops.model import TorchModel

    if device == "cpu":
        torch.set_num_threads(num_threads)
    arrays = {name: as_array(weight) for name, weight in weights.items()}
    model = TorchModel(config, arrays, getattr(torch, dtype), torch.device(device))
    if device == "cpu":
        return model
    return GraphedModel(model, partial(record_cuda_graph, model.device))


def load_config(folder: Path) -> LlamaConfig:
    """Read config.json, and the end-of-sequence tokens that generation_config.json adds.

    Raises:
        ModelError: the architecture is not supported, or a value is missing or invalid.
    """
    path = folder / "config.json"
    values = _read_json(path)
    try:
        _check_architecture(values)
        return _config(values, _eos_ids(folder, values))
    except KeyError as exc:
        raise ModelError(f"{path} has no {exc}") from exc
    except ModelError as exc:
        raise ModelError(f"{path}: {exc}") from exc


def _config(values: dict[str, Any], eos_ids: frozenset[int]) -> LlamaConfig:
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim")
    if head_dim is None:
        if not (type(heads) is type(hidden) is int and heads > 0 and hidden % heads == 0):
            raise ModelError(
                f"hidden_size {hidden!r} is not a multiple of num_attention_heads {heads!r}"
            )
        head_dim = hidden // heads
    kv_heads = values.get("num_key_value_heads")
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        max_positions=values["max_position_embeddings"],
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=_rope(values).get("rope_theta", 10000.0),
        is_tied=values.get("tie_word_embeddings", False),
        eos_ids=eos_ids,
    )


def _check_architecture(values: dict[str, Any]) -> None:
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if name != "LlamaForCausalLM":
        raise ModelError(f"the architecture is {name!r}; smol supports LlamaForCausalLM")
    rope_type = _rope(values).get("rope_type", "default")
    if rope_type != "default":
        raise ModelError(f"rope type {rope_type!r} is not supported, only 'default'")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ModelError(f"{name} is not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {values['hidden_act']!r} is not supported, only 'silu'")


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, whose place in config.json has changed over time."""
    settings = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    for name in ("rope_scaling", "rope_parameters"):
        found = values.get(name) or {}
        if not isinstance(found, dict):
            raise ModelError(f"{name} must be an object, not {found!r}")
        if "type" in found:
            settings["rope_type"] = found["type"]
        settings |= found
    return settings


def _eos_ids(folder: Path, values: dict[str, Any]) -> frozenset[int]:
    path = folder / "generation_config.json"
    ids: set[int] = set()
    for source in (values, _read_json(path) if path.exists() else {}):
        found = source.get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token_id) is int for token_id in listed):
            raise ModelError(f"eos_token_id must be a token id or a list of them, not {found!r}")
        ids.update(listed)
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {path}: {error_reason(exc)}") from exc
