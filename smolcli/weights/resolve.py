"""Finds the files of a model by its name or path."""

import logging
import os
import re
from pathlib import Path

from smolcli.errors import ModelNotFound
from smolcli.weights import hub
from smolcli.weights.store import (
    GGUF_FILE,
    ModelFiles,
    Notify,
    locked_scratch,
    missing_file,
    sha256_of,
    stored,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
REVISION_FILES = (  # every file that can change a model's answers
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "*.safetensors",
    GGUF_FILE,
)

logger = logging.getLogger(__name__)


def resolve(model: str, notify: Notify = logger.info) -> ModelFiles:
    """Find a model, downloading it from the Hub if this machine does not have it.

    The lookup order is: local directory or .gguf file, Hugging Face cache, model store, Hub.

    Args:
        model: a path or a Hub id.
        notify: receives progress messages.

    Raises:
        ModelNotFound: the model does not exist, or its directory is incomplete.
        HubUnreachable: it has to be downloaded and the Hub does not answer.
    """
    return on_disk(model, notify) or hub.download(model, notify)


def on_disk(model: str, notify: Notify = logger.info) -> ModelFiles | None:
    """Find a model on this machine; None if it has to be downloaded."""
    return local(model, notify) or hub.cached(model) or stored(model)


def local(model: str, notify: Notify) -> ModelFiles | None:
    """Find the model at the path `model`; None if `model` is a Hub id instead.

    Raises:
        ModelNotFound: `model` can only be a path, and there is no usable model at it.
    """
    if not model:
        raise ModelNotFound("the name of the model is empty")
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return _from_folder(model, path)
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            raise ModelNotFound(f"no such file: {path}")
        return _from_gguf(path, notify)
    if os.path.isfile(path) or not HUB_ID.fullmatch(model):
        raise ModelNotFound(
            f"{model!r} is not a model: pass a directory, a .gguf file or a Hub id "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return None


def _from_folder(model: str, folder: Path) -> ModelFiles:
    if missing := missing_file(folder):
        raise ModelNotFound(f"the directory {folder} is not a complete model: it has no {missing}")
    relevant = [path for pattern in REVISION_FILES for path in sorted(folder.glob(pattern))]
    return ModelFiles(model, folder, sha256_of(*relevant), "folder")


def _from_gguf(path: Path, notify: Notify) -> ModelFiles:
    """The model in a .gguf file, converted when this content is first seen."""
    from smolcli.weights.gguf_conversion import add_gguf  # late: imports numpy

    name = f"gguf--{sha256_of(path)}"
    if found := stored(name):
        return found
    with locked_scratch(name) as scratch:
        return stored(name) or add_gguf(path, name, "gguf", scratch, notify)
