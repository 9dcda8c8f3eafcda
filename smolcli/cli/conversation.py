"""A conversation: its turns, the query that comes next, and the line that it is saved as."""

import json
import os
import secrets
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from smolcli.errors import RunError
from smolcli.settings import QueryDefaults
from smolcli.types import Message, Query


class Conversation:
    """QueryReader and answers so far, and the system prompt before them.

    Args:
        defaults: how answers are generated, and the system prompt to begin with.
    """

    def __init__(self, defaults: QueryDefaults) -> None:
        self.system_prompt = defaults.system_prompt
        self.sampling = defaults.sampling
        self._exchanges: list[tuple[Message, Message]] = []  # question and answer

    def query(self, question: str) -> Query:
        """The next question, with all that was said before."""
        return Query("chat", (*self._messages(), Message("user", question)), self.sampling)

    def keep(self, question: str, answer: str) -> None:
        """Add an exchange."""
        self._exchanges.append((Message("user", question), Message("assistant", answer)))

    def reset(self) -> None:
        """Forget every exchange; the system prompt stays."""
        self._exchanges.clear()

    def forget(self) -> int:
        """Forget the older half of the exchanges; gives their number."""
        num_forgotten = (len(self._exchanges) + 1) // 2
        del self._exchanges[:num_forgotten]
        return num_forgotten

    def save(self, path: Path) -> None:
        """Append the conversation to a file of queries.

        Raises:
            RunError: where nothing was answered yet, or the file cannot be written.
        """
        if not self._exchanges:
            raise RunError("there is no answer to save yet")
        line = json.dumps(self._record(), ensure_ascii=False) + "\n"
        try:
            with path.open("ab+") as file:
                if _is_torn(file):
                    file.write(b"\n")
                file.write(line.encode())
        except OSError as exc:
            raise RunError(f"cannot write {path}: {exc.strerror or exc}") from exc

    def _messages(self) -> list[Message]:
        system = [Message("system", self.system_prompt)] if self.system_prompt else []
        return [*system, *(message for exchange in self._exchanges for message in exchange)]

    def _record(self) -> dict[str, Any]:
        """A query that asks the last question again; `metadata` has the answer it got."""
        *messages, answer = self._messages()
        now = datetime.now()
        return {
            "chat_id": f"chat-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            "messages": [asdict(message) for message in messages],
            **asdict(self.sampling),
            "metadata": {"response": answer.content},
        }


def _is_torn(file: BinaryIO) -> bool:
    """Whether the last line of a file opened to append has no end."""
    if file.tell() == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
