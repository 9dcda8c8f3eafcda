"""Fault injection: a local backend whose model fails on request."""

from typing import Any

from smolcli.backends.local import LocalBackend
from smolcli.engine.engine import Engine
from smolcli.engine.interfaces import Batch, Hidden, Model
from smolcli.settings import EngineSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message
from smolcli.weights.loader import load_model, resolve_model_config
from smolcli.weights.resolve import resolve


class FaultyModel:
    """Fails the next `num_failures` steps, and every step that contains a token of `poison`."""

    poison = "Play the xylophone"

    def __init__(self, model: Model, chat: ChatTokenizer) -> None:
        self._model = model
        harmless = set(chat.encode((Message("user", "Play the"),)))
        self._poison_id = max(set(chat.encode((Message("user", self.poison),))) - harmless)
        self.num_failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, batch: Batch) -> Hidden:
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("injected fault")
        if self._poison_id in batch.token_ids:
            raise RuntimeError("injected fault of one query")
        return self._model.forward(batch)


def open_faulty(settings: EngineSettings, models: list[FaultyModel]) -> LocalBackend:
    """Open a local backend around a faulty model, which is appended to `models`."""
    folder = resolve(settings.model).folder
    config = resolve_model_config(settings, folder)
    chat = ChatTokenizer.load(folder)

    def build_engine() -> Engine:
        models.append(
            FaultyModel(
                load_model(folder, config.dtype, config.device, config.kernels, config.threads),
                chat,
            )
        )
        return Engine(models[0], config.max_batch_size, config.kv_cache_bytes)

    return LocalBackend(lambda: chat, build_engine, {}, settings.max_concurrency)
