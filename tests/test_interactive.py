"""`smol chat`: conversation state, saving and interrupts."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import DyingBackend, EchoBackend
from server_tools import TIMEOUT_S, eventually, serving, tiny_engine
from test_cli import REPOSITORY, Seen, process, smol

from smolcli.backends.base import OnText
from smolcli.backends.local import open_local
from smolcli.cli.conversation import Conversation
from smolcli.cli.interactive import InteractiveChat
from smolcli.settings import QueryDefaults
from smolcli.types import Query, Result, Sampling

READS = "\x1b[?2004h"  # enables bracketed paste, so the prompt is ready


def turns_of(query: Query) -> list[str]:
    """The content of each message; system messages are marked."""
    return [t.content if t.role != "system" else f"system: {t.content}" for t in query.messages]


def talk(
    backend: EchoBackend,
    *lines: str,
    max_new_tokens: int = 256,
    shown: list[str] | None = None,
) -> tuple[str, list[str]]:
    """Run a session that prints to `shown`; returns the printed text and the notices."""
    shown = [] if shown is None else shown
    said: list[str] = []
    conversation = Conversation(QueryDefaults(Sampling(max_new_tokens=max_new_tokens)))
    InteractiveChat(backend, conversation, shown.append, said.append, is_interactive=True).run(
        lines
    )
    return "".join(shown), said


def test_each_question_includes_the_earlier_exchanges() -> None:
    seen, open_backend = Seen.opener()
    done = smol("chat", "--seed", 1, backend=open_backend, input="Hi\n\n  \nHow are you?\n")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "Hi (1)\nHow are you? (1)\n"
    assert [turns_of(query) for query in seen.queries_seen] == [
        ["Hi"],
        ["Hi", "Hi (1)", "How are you?"],
    ]


def test_commands_change_the_system_prompt_reset_and_quit() -> None:
    seen, open_backend = Seen.opener()
    lines = "one\n/system Be brief.\ntwo\n/reset\n/system\nthree\n/quit\nfour\n"
    done = smol("chat", "--system", "Be kind.", "--seed", 1, backend=open_backend, input=lines)
    assert [turns_of(query) for query in seen.queries_seen] == [
        ["system: Be kind.", "one"],
        ["system: Be brief.", "one", "one (1)", "two"],
        ["three"],
    ]
    assert done.stderr.splitlines() == [
        "system prompt: Be brief.",
        "conversation cleared",
        "system prompt: the model's default",
    ]


def test_help_lists_every_command_and_a_typo_is_not_a_question() -> None:
    shown, said = talk(EchoBackend(), "/help", "/sve", "/xyz", " /etc is what?")
    for command in ("/system", "/save", "/reset", "/help", "/quit"):
        assert command in said[0]
    assert said[1:] == [
        "unknown command /sve; did you mean /save?",
        "unknown command /xyz; /help lists the commands",
    ]
    assert shown == "/etc is what? (0)\n"


def test_saved_conversation_is_a_query_with_the_same_answer(
    tmp_path: Path, tiny_folder: Path
) -> None:
    path, output = tmp_path / "saved.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(b'{"chat_id": "1", "user_prompt": "no end of line"}')
    lines = f"Hi\nWhy?\n/save {path}\n/reset\n/save\nAnd you?\n/save {path}\n"
    model = ("--model", tiny_folder, "--dtype", "float32", "--threads", 1)
    sampling = ("--temperature", 1, "--top-k", 9, "--max-new-tokens", 9)
    done = smol("chat", *model, *sampling, "--system", "Be kind.", backend=None, input=lines)
    assert "there is nothing to save yet" in done.stderr
    assert smol("run", path, "-o", output, *model, backend=None).exit_code == 0
    results = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert len(results) == 3
    for result in results[1:]:
        assert result["response"] == result["metadata"]["response"]
    messages = json.loads(path.read_bytes().splitlines()[1])["messages"]
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "user"]


def test_the_command_for_a_saved_conversation_can_be_copied(tmp_path: Path) -> None:
    path = tmp_path / "my chat.jsonl"
    _, said = talk(EchoBackend(), "Hi", f"/save {path}")
    assert f"smol run '{path}'" in said[0]


def test_unwritable_file_does_not_end_the_session(tmp_path: Path) -> None:
    shown, said = talk(EchoBackend(), "one", f"/save {tmp_path}/no/such", "two")
    assert shown == "one (0)\ntwo (0)\n"
    assert said == [f"cannot write {tmp_path}/no/such: No such file or directory"]


def test_long_conversation_drops_its_oldest_exchanges(tiny_folder: Path) -> None:
    """512 tokens of context: neither a full one nor a last short answer ends the conversation."""
    with closing(open_local(replace(tiny_engine(tiny_folder), threads=1))) as backend:
        questions = [f"Is it {number}? {'Say something. ' * 6}" for number in range(20)]
        shown, said = talk(backend, *questions, max_new_tokens=40)  # type: ignore[arg-type]
        assert len([line for line in said if "dropped" in line]) >= 2
        assert not [line for line in said if "tokens; at most" in line]
        assert shown.strip()
        shown, said = talk(backend, "far too long " * 500)  # type: ignore[arg-type]
        assert (shown, len(said)) == ("", 1)
        assert said[0].endswith("512 tokens, of which the answer needs at least 1")


def test_unanswered_question_is_not_kept() -> None:
    done = smol("chat", backend=lambda settings: DyingBackend(num_answers=1), input="one\ntwo\n")
    assert done.exit_code == 3
    assert done.stdout.startswith("one (")
    assert done.stderr == "the engine died\n"


class Interrupted(EchoBackend):
    """Streams one word, then the user presses Ctrl-C; answers the next question.

    Args:
        is_shown: whether the user sees the word.
    """

    def __init__(self, is_shown: Callable[[], bool]) -> None:
        super().__init__()
        self.is_shown = is_shown
        self.futures: list[Future[Result]] = []
        self.queries: list[Query] = []

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        self.queries.append(query)
        if self.futures:
            return super().submit(query, on_text)
        assert on_text is not None
        on_text("Once")
        on_text("")  # once the session prints it, the word is part of the answer
        self.futures.append(Future())
        threading.Thread(target=self.interrupt).start()
        return self.futures[0]

    def interrupt(self) -> None:
        try:
            eventually(self.is_shown)
        except AssertionError as exc:
            self.futures[0].set_exception(exc)  # else the session would wait forever
        else:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_interrupt_stops_only_the_answer() -> None:
    pieces: list[str] = []
    backend = Interrupted(lambda: len(pieces) == 2)
    shown, said = talk(backend, "A story.", "Go on.", shown=pieces)
    assert shown == "Once\nGo on. (0)\n"
    assert said == ["stopped"]
    assert backend.futures[0].cancelled()
    assert turns_of(backend.queries[1]) == ["A story.", "Once", "Go on."]


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_interrupt_ends_a_piped_session() -> None:
    def is_shown() -> bool:
        stdout: Any = sys.stdout  # the command's, in memory
        return b"Once" in stdout.buffer.getvalue()

    done = smol("chat", backend=lambda _: Interrupted(is_shown), input="A story.\nGo on.\n")
    assert (done.exit_code, done.stdout) == (130, "Once")


def test_answers_via_a_server_are_the_same(tiny_folder: Path) -> None:
    sampling = ("--max-new-tokens", 9, "--seed", 1)
    lines = "Hi\nWhy?\n"
    with serving(open_local, replace(tiny_engine(tiny_folder), threads=1)) as server:
        remote = smol("chat", "--via", server.url, *sampling, backend=None, input=lines)
    model = ("--model", tiny_folder, "--dtype", "float32", "--threads", 1)
    local = smol("chat", *model, *sampling, backend=None, input=lines)
    assert (remote.exit_code, local.exit_code) == (0, 0)
    assert remote.stdout == local.stdout
    assert len(local.stdout.splitlines()) >= 2


def test_invalid_utf8_from_a_pipe_is_replaced(tiny_folder: Path) -> None:
    done = process("chat", "--model", tiny_folder, "--max-new-tokens", 3, input=b"caf\xe9\n")
    assert (done.returncode, done.stderr) == (0, b"answer truncated after 3 tokens\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudoterminal")
def test_lines_can_be_edited_on_a_terminal(tiny_folder: Path, tmp_path: Path) -> None:
    """Lines can be edited; Ctrl-C at the prompt clears the line, Ctrl-D exits."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "smolcli", "chat", "--max-new-tokens", "3", "--model"]
    environment = {**os.environ, "SMOL_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
    with subprocess.Popen(
        [*command, str(tiny_folder)], stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY,
        env=environment, start_new_session=True,
    ) as running:  # fmt: skip
        os.close(theirs)
        shown = until(ours, READS)
        os.write(ours, b"half a li\x03")
        shown += until(ours, "/help lists") + until(ours, READS)
        os.write(ours, b"Hxi\x1b[D\x7f\r")  # an arrow to the left, and backspace
        shown += until(ours, "truncated") + until(ours, READS)
        os.write(ours, b"\x04")
        assert running.wait(TIMEOUT_S) == 0
    os.close(ours)
    history = (tmp_path / "chat_history").read_text()
    assert history.splitlines()[-1] == "+Hi"
    assert "Traceback" not in shown


def until(descriptor: int, text: str) -> str:
    """Read what a terminal shows until some text appears."""
    shown = b""
    while text.encode() not in shown:
        assert select.select([descriptor], [], [], 60)[0], f"it stopped at {shown!r}"
        shown += os.read(descriptor, 1)
    return shown.decode(errors="replace")
