"""The loop of `smol chat`: reads lines, runs commands, streams answers."""

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from smolcli.backends.base import Backend, stream
from smolcli.cli.conversation import Conversation
from smolcli.errors import BackendError, RunError, closest, counted
from smolcli.types import ErrorCode, FinishReason, Query, Result

COMMANDS = {
    "/system": "[TEXT]  set the system prompt; without TEXT, use the model's own",
    "/save": "[FILE]  append the conversation to a file for smol run (default: chat.jsonl)",
    "/reset": "        forget the conversation so far",
    "/help": "        show this list",
    "/quit": "        quit (also Ctrl-D)",
}
HELP = "\n".join(
    [f"{word:8}{does}" for word, does in COMMANDS.items()]
    + ["Ctrl-C stops an answer. To send a message that starts with /, put a space before it."]
)
DEFAULT_FILE = "chat.jsonl"


class InteractiveChat:
    """One user's conversation with a backend.

    Args:
        backend: generates the answers.
        conversation: initial state.
        print_text: receives answers piece by piece.
        notify: receives messages to the user, one sentence each.
        is_interactive: whether Ctrl-C stops only the current answer.
    """

    def __init__(
        self,
        backend: Backend,
        conversation: Conversation,
        print_text: Callable[[str], None],
        notify: Callable[[str], None],
        is_interactive: bool,
    ) -> None:
        self._backend = backend
        self._conversation = conversation
        self._print_text = print_text
        self._notify = notify
        self._is_interactive = is_interactive
        self.num_failed = 0

    def run(self, lines: Iterable[str]) -> None:
        """Handle lines until they end or one of them is /quit."""
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "/quit":
                return
            if word.startswith("/"):
                self._run_command(word, rest.strip())
            elif line.strip():
                self._answer(line.strip())

    def _run_command(self, word: str, text: str) -> None:
        if word == "/system":
            self._conversation.system_prompt = text or None
            self._notify("system prompt: " + (text or "the model's default"))
        elif word == "/save":
            self._save(Path(os.path.expanduser(text or DEFAULT_FILE)))
        elif word == "/reset":
            self._conversation.reset()
            self._notify("conversation cleared")
        elif word == "/help":
            self._notify(HELP)
        else:
            near = closest(word, COMMANDS)
            hint = f"did you mean {near}?" if near else "/help lists the commands"
            self._notify(f"unknown command {word}; {hint}")

    def _save(self, path: Path) -> None:
        try:
            self._conversation.save(path)
            command = f"smol run {shlex.quote(str(path))}"
            self._notify(f"saved to {path}; {command} asks the last question again")
        except RunError as exc:
            self._notify(str(exc))

    def _answer(self, question: str) -> None:
        """Answer a question, dropping old exchanges if the conversation has become too long."""
        try:
            text, result = self._stream(self._conversation.query(question))
            while result and result.error_code is ErrorCode.PROMPT_TOO_LONG and self._drop_oldest():
                text, result = self._stream(self._conversation.query(question))
        except BackendError as exc:
            self._fail(str(exc))
            return
        if result is None:
            self._notify("stopped")
        elif result.is_error:
            self._fail(str(result.error))
            return
        if text:
            self._conversation.add(question, text)
        if result is not None:
            self._note_truncation(result)

    def _stream(self, query: Query) -> tuple[str, Result | None]:
        """Print an answer as it is generated.

        Returns:
            Its text and its result, which is None if Ctrl-C stopped the answer.
        """
        pieces, future = stream(self._backend, query)
        text = ""
        try:
            for piece in pieces:
                self._print_text(piece)
                text += piece
        except KeyboardInterrupt:
            future.cancel()
            if not self._is_interactive:
                raise
        if text:
            self._print_text("\n")
        return text, None if future.cancelled() else future.result()

    def _note_truncation(self, result: Result) -> None:
        if result.finish_reason is FinishReason.LENGTH and result.usage is not None:
            num_tokens = result.usage.completion_tokens
            self._notify(f"answer truncated after {counted(num_tokens, 'token')}")
            if num_tokens < self._conversation.sampling.max_new_tokens:
                self._drop_oldest()  # the context is full, not the answer

    def _drop_oldest(self) -> int:
        if num_dropped := self._conversation.drop_oldest():
            oldest = "exchange" if num_dropped == 1 else f"{num_dropped} exchanges"
            self._notify(f"the conversation exceeds the context; dropped the oldest {oldest}")
        return num_dropped

    def _fail(self, message: str) -> None:
        self.num_failed += 1
        self._notify(message)
