"""From a model's folder to the engine's model: config.json, safetensors, weights laid out."""

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from smolcli.engine.config import LlamaConfig
from smolcli.engine.interfaces import Model
from smolcli.engine.native.bindings import BFLOAT16, Array, Kernels
from smolcli.engine.native.model import NativeModel
from smolcli.errors import ModelError


def load_model(
    folder: Path,
    dtype: Literal["float32", "bfloat16"],
    device: str = "cpu",
    kernels: Kernels | None = None,
    num_threads: int = 1,
) -> Model:
    """Load a Llama checkpoint in the layout of transformers' `save_pretrained`.

    Args:
        folder: where it is.
        dtype: to compute in.
        device: to compute on.
        kernels: the native kernels of the dtype; None computes with torch.
        num_threads: CPU threads to compute with.

    Raises:
        ModelError: it is of another architecture, or its files are damaged.
    """
    config = load_config(folder)
    weights = _weights(folder)
    try:
        if kernels is not None:
            arrays = {name: _as_array(weight) for name, weight in weights.items()}
            return NativeModel(config, arrays, kernels, num_threads)
        return _torch_model(config, weights, dtype, device, num_threads)
    except KeyError as exc:
        raise ModelError(f"{folder}: the weights hold no {exc}") from exc
    except RuntimeError as exc:
        raise ModelError(f"{folder}: the weights do not fit config.json: {exc}") from exc


def _torch_model(
    config: LlamaConfig, weights: dict[str, Any], dtype: str, device: str, num_threads: int
) -> Model:
    import torch

    from smolcli.engine.torch_ops.cuda_graphs import GraphedModel, record_cuda_graph
    from smolcli.engine.torch_ops.model import TorchModel

    if device == "cpu":
        torch.set_num_threads(num_threads)
    model = TorchModel(config, weights, getattr(torch, dtype), torch.device(device))
    if device == "cpu":
        return model
    return GraphedModel(model, partial(record_cuda_graph, model.device))


def _as_array(weight: Any) -> Array:
    """A tensor as a NumPy array that shares its memory."""
    import torch

    if weight.dtype is torch.bfloat16:
        weight = weight.view(torch.int16)
        half: Array = weight.numpy().view(BFLOAT16)
        return half
    array: Array = weight.numpy()
    return array


def load_config(folder: Path) -> LlamaConfig:
    """The shape that config.json tells, with every end-of-sequence id of the model.

    Raises:
        ModelError: it is not a Llama model, or not one of a kind that smol runs.
    """
    values = _read_json(folder / "config.json")
    _check_architecture(folder, values)
    try:
        return _config(folder, values)
    except KeyError as exc:
        raise ModelError(f"{folder / 'config.json'} has no {exc}") from exc


def _config(folder: Path, values: dict[str, Any]) -> LlamaConfig:
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or hidden // heads,
        max_positions=values["max_position_embeddings"],
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=_rope(values).get("rope_theta", 10000.0),
        is_tied=values.get("tie_word_embeddings", False),
        eos_ids=_eos_ids(folder, values),
    )


def _check_architecture(folder: Path, values: dict[str, Any]) -> None:
    kind = (values.get("architectures") or ["?"])[0]
    if kind != "LlamaForCausalLM":
        raise ModelError(f"{folder}: a {kind} model; smol runs LlamaForCausalLM models")
    rope_type = _rope(values).get("rope_type", "default")
    if rope_type != "default":
        raise ModelError(f"{folder}: rope type {rope_type!r} is not supported, only 'default'")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ModelError(f"{folder}: {name} is not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{folder}: activation {values['hidden_act']!r} is not supported")


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, which older and newer versions of transformers write differently."""
    old = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    scaling = values.get("rope_scaling") or {}
    if "type" in scaling:
        old["rope_type"] = scaling["type"]
    return old | scaling | (values.get("rope_parameters") or {})


def _eos_ids(folder: Path, values: dict[str, Any]) -> frozenset[int]:
    path = folder / "generation_config.json"
    sources = [values, _read_json(path) if path.exists() else {}]
    ids: set[int] = set()
    for source in sources:
        found = source.get("eos_token_id")
        ids.update([found] if isinstance(found, int) else found or [])
    return frozenset(ids)


def _weights(folder: Path) -> dict[str, Any]:
    """Tensors by name, without the leading "model."; memory-mapped, not copied."""
    weights: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                weights |= {name.removeprefix("model."): file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as exc:
            raise ModelError(f"{path}: damaged or unreadable: {exc}") from exc
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path}: cannot be read: {exc}") from exc
    return values
