"""Builds the local backend: finds the model, loads it, starts its thread."""

import platform
from typing import Any, Literal

import torch

import smolcli
from smolcli.backends.local import LocalBackend
from smolcli.engine.autoconfig import Setup, choose, chosen_dtype
from smolcli.engine.engine import Engine
from smolcli.settings import EngineSettings
from smolcli.text.tokenizer import Chat
from smolcli.weights.loader import load_config, load_model
from smolcli.weights.resolve import ModelFiles, resolve


def open_local(settings: EngineSettings, files: ModelFiles | None = None) -> LocalBackend:
    """A backend that answers with the model in this process.

    Args:
        settings: which model, and how.
        files: the model, where the caller has found it already.

    Raises:
        ModelError: the model is not to be had or not usable.
        UsageError: the device or dtype is not available here.
    """
    files = files or resolve(settings.model)
    setup = choose(settings, load_config(files.folder))

    def build_engine() -> Engine:
        torch.set_num_threads(setup.threads)
        return Engine(
            load_model(files.folder, setup.dtype, setup.device, setup.kernels),
            setup.slots,
            cache_bytes=setup.cache_bytes,
            prefix_bytes=settings.prefix_cache_mb << 20,
        )

    return LocalBackend(
        lambda: Chat.load(files.folder),
        build_engine,
        _identity(files, setup),
        settings.max_concurrency,
    )


def dtype_here(settings: EngineSettings) -> Literal["float32", "bfloat16"]:
    """The dtype that the settings come to on this machine.

    Raises:
        UsageError: the device is not available here.
    """
    return "float32" if chosen_dtype(settings) is torch.float32 else "bfloat16"


def _identity(files: ModelFiles, setup: Setup) -> dict[str, Any]:
    return {
        "model": files.model,
        "revision": files.revision,
        "source": files.source,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": str(setup.device),
        "kernels": "native" if setup.kernels else "torch",
        "threads": setup.threads,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What this process computes with."""
    return {
        "smol": smolcli.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
