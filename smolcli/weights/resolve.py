"""Which folder a model's name means."""

import logging
import re
from pathlib import Path

from smolcli.errors import ModelNotFound
from smolcli.weights import hub
from smolcli.weights.gguf import add_gguf
from smolcli.weights.store import ModelFiles, Report, exclusively, missing_file, sha256_of, stored

__all__ = ["ModelFiles", "resolve"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DECIDING = (  # the files that decide the answers
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "*.safetensors",
)

log = logging.getLogger(__name__)


def resolve(model: str, report: Report = log.info) -> ModelFiles:
    """Find `model`: a local folder or .gguf file, else in the Hugging Face cache, the model store,
    or, downloading it, on the Hub.

    Raises:
        ModelNotFound: if nobody has it, or the local folder is not whole.
        HubUnreachable: if it would have to be downloaded and cannot.
    """
    return on_disk(model, report) or hub.download(model, report)


def on_disk(model: str, report: Report = log.info) -> ModelFiles | None:
    """The model as far as this machine has it, None if it would have to be downloaded."""
    return local(model, report) or hub.cached(model) or stored(model)


def local(model: str, report: Report) -> ModelFiles | None:
    """The model at the path `model`, None if it is the name of one instead.

    Raises:
        ModelNotFound: if it can only be a path, and nothing usable is there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(model, path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"there is no file {path}")
        return _from_gguf(path, report)
    if path.is_file() or not HUB_ID.fullmatch(model):
        raise ModelNotFound(
            f"{model!r} is no model: give a folder, a .gguf file, or a name as the Hub has it, "
            "like HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return None


def _from_folder(model: str, folder: Path) -> ModelFiles:
    if missing := missing_file(folder):
        raise ModelNotFound(f"the folder {folder} is no model: it has no {missing}")
    deciding = [path for pattern in DECIDING for path in sorted(folder.glob(pattern))]
    return ModelFiles(model, folder, sha256_of(*deciding), "folder")


def _from_gguf(path: Path, report: Report) -> ModelFiles:
    """The model in a .gguf file, converted the first time that its content is seen."""
    name = f"gguf--{sha256_of(path)}"
    if found := stored(name):
        return found
    with exclusively(name) as scratch:
        return stored(name) or add_gguf(path, name, "gguf", scratch, report)
