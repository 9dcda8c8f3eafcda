"""`smol chat`: lines that somebody types in, answers as they come out."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from smolcli.backends.base import Backend
from smolcli.cli.conversation import Conversation
from smolcli.errors import BackendError, RunError
from smolcli.types import ErrorCode, FinishReason, Query, Result

COMMANDS = {
    "/system": "[TEXT]  what the model is told to be from now on; without TEXT, its default",
    "/save": "[FILE]  append the conversation to a file for `smol run`; without FILE, chat.jsonl",
    "/reset": "        forget what was said",
    "/help": "        this list",
    "/quit": "        end, as Ctrl-D does",
}
HELP = "\n".join(
    [f"{word:8}{does}" for word, does in COMMANDS.items()]
    + ["Ctrl-C stops an answer. A question about a /word begins with a space."]
)
DEFAULT_FILE = "chat.jsonl"
POLL_S = 0.2  # a wait without an end cannot be interrupted on Windows


class InteractiveChat:
    """One person's conversation with a backend.

    Args:
        backend: answers.
        conversation: where it begins.
        show: takes pieces of answers.
        say: takes remarks, one sentence each.
        is_interactive: whether an interrupt stops the answer alone.
    """

    def __init__(
        self,
        backend: Backend,
        conversation: Conversation,
        show: Callable[[str], None],
        say: Callable[[str], None],
        is_interactive: bool,
    ) -> None:
        self._backend = backend
        self._conversation = conversation
        self._show = show
        self._say = say
        self._is_interactive = is_interactive
        self.num_failed = 0

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until there is none or one of them is /quit."""
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "/quit":
                return
            if word.startswith("/"):
                self._obey(word, rest.strip())
            elif line.strip():
                self._ask(line.strip())

    def _obey(self, word: str, text: str) -> None:
        if word == "/system":
            self._conversation.system_prompt = text or None
            self._say(f"system prompt: {text or 'the model has its own default'}")
        elif word == "/save":
            self._save(Path(text or DEFAULT_FILE).expanduser())
        elif word == "/reset":
            self._conversation.reset()
            self._say("what was said is forgotten")
        elif word == "/help":
            self._say(HELP)
        else:
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            self._say(f"there is no command {word}; {hint}")

    def _save(self, path: Path) -> None:
        try:
            self._conversation.save(path)
            self._say(f"saved to {path}; `smol run {path}` asks the last question again")
        except RunError as exc:
            self._say(str(exc))

    def _ask(self, question: str) -> None:
        """Answer a question; where it does not fit, forget what is oldest and try again."""
        try:
            text, result = self._stream(self._conversation.query(question))
            while result and result.error_code is ErrorCode.PROMPT_TOO_LONG and self._forget():
                text, result = self._stream(self._conversation.query(question))
        except BackendError as exc:
            self._fail(str(exc))
            return
        if result is None:
            self._say("stopped")
        elif result.is_error:
            self._fail(str(result.error))
            return
        if text:
            self._conversation.keep(question, text)
        if result is not None:
            self._remark_on_end(result)

    def _stream(self, query: Query) -> tuple[str, Result | None]:
        """The text of an answer, shown as it came, and its result; None if it was stopped."""
        pieces: SimpleQueue[str | None] = SimpleQueue()
        future = self._backend.submit(query, pieces.put, is_interactive=True)
        future.add_done_callback(lambda _: pieces.put(None))
        text = ""
        try:
            for piece in _until_none(pieces):
                self._show(piece)
                text += piece
        except KeyboardInterrupt:
            future.cancel()
            if not self._is_interactive:
                raise
        if text:
            self._show("\n")
        return text, None if future.cancelled() else future.result()

    def _remark_on_end(self, result: Result) -> None:
        if result.finish_reason is FinishReason.LENGTH and result.usage is not None:
            num_tokens = result.usage.completion_tokens
            self._say(f"cut short after {num_tokens} tokens")
            if num_tokens < self._conversation.sampling.max_new_tokens:
                self._forget()

    def _forget(self) -> int:
        if num_forgotten := self._conversation.forget():
            oldest = "exchange is" if num_forgotten == 1 else f"{num_forgotten} exchanges are"
            self._say(f"there is no room for all that was said: the oldest {oldest} forgotten")
        return num_forgotten

    def _fail(self, message: str) -> None:
        self.num_failed += 1
        self._say(message)


def _until_none(pieces: "SimpleQueue[str | None]") -> Iterator[str]:
    """What comes through a queue, until None does."""
    while True:
        with suppress(Empty):
            piece = pieces.get(timeout=POLL_S)
            if piece is None:
                return
            yield piece
