"""The state of a conversation: builds the next query, and can be saved as a query."""

import json
import os
import secrets
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from smolcli.errors import RunError, cannot_write
from smolcli.settings import QueryDefaults
from smolcli.types import Message, Query


class Conversation:
    """A system prompt and the exchanges so far.

    Args:
        defaults: sampling of the answers, and the initial system prompt.
    """

    def __init__(self, defaults: QueryDefaults) -> None:
        self.system_prompt = defaults.system_prompt
        self.sampling = defaults.sampling
        self._exchanges: list[tuple[Message, Message]] = []  # question and answer

    def query(self, question: str) -> Query:
        """A query for the next question that includes all earlier exchanges."""
        return Query("chat", (*self._messages(), Message("user", question)), self.sampling)

    def add(self, question: str, answer: str) -> None:
        """Add a question and its answer."""
        self._exchanges.append((Message("user", question), Message("assistant", answer)))

    def reset(self) -> None:
        """Remove all exchanges; the system prompt stays."""
        self._exchanges.clear()

    def drop_oldest(self) -> int:
        """Remove the older half of the exchanges and return their number."""
        num_dropped = (len(self._exchanges) + 1) // 2
        del self._exchanges[:num_dropped]
        return num_dropped

    def save(self, path: Path) -> None:
        """Append the conversation to a JSON Lines file that `smol run` can answer.

        Raises:
            RunError: there is nothing to save, or the file cannot be written.
        """
        if not self._exchanges:
            raise RunError("there is nothing to save yet")
        line = json.dumps(self._record(), ensure_ascii=False) + "\n"
        try:
            with path.open("ab+") as file:
                if _lacks_newline(file):
                    file.write(b"\n")
                file.write(line.encode())
        except OSError as exc:
            raise cannot_write(path, exc) from exc

    def _messages(self) -> list[Message]:
        system = [Message("system", self.system_prompt)] if self.system_prompt else []
        return [*system, *(message for exchange in self._exchanges for message in exchange)]

    def _record(self) -> dict[str, Any]:
        """A query that repeats the last question, with its answer under `metadata`."""
        *messages, answer = self._messages()
        now = datetime.now()
        return {
            "chat_id": f"chat-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            "messages": [{"role": each.role, "content": each.content} for each in messages],
            **{name: value for name, value in asdict(self.sampling).items() if value != ()},
            "metadata": {"response": answer.content},
        }


def _lacks_newline(file: BinaryIO) -> bool:
    """Whether the last line of a file opened for appending is unterminated."""
    if file.tell() == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
