"""`smol ask`: answer one question."""

import json
import shlex
import sys
from concurrent.futures import wait
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from smolcli.cli.argument_conversion import SmolCommand
from smolcli.cli.options import AsJson, option, read_text, require_utf8, with_option_groups
from smolcli.cli.options.backend import ViaOptions, backend_opener
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.generation import GenerationOptions, Schema, read_schema
from smolcli.cli.terminal import is_redirected, log_to_stderr
from smolcli.errors import RunError, UsageError
from smolcli.protocol.prompt import prompt_query

EXAMPLES = (
    '[bold]smol ask "What is gravity?"[/bold]\n\n'
    '[bold]cat report.txt | smol ask "Summarize this:"[/bold] appends stdin to the question.\n\n'
    '[bold]smol ask --system "Answer in French." --json - < question.txt[/bold]\n\n'
    "[bold]smol ask --prompt-file review.md < main.c[/bold] reads the question from a file.\n\n"
    '[bold]smol ask -- "-5 + 3?"[/bold] asks a question that begins with a dash.'
)
_TRY = 'try smol ask "What is gravity?"'

Question = Annotated[
    str | None,
    typer.Argument(
        metavar="QUESTION",
        help="Question to answer. Text from a pipe or a redirected file is appended to it. If it "
        "is - or missing, stdin is the question.",
    ),
]
PromptFile = Annotated[
    Path | None,
    option(
        "--prompt-file",
        metavar="FILE",
        help="Read the question from a file, in UTF-8. Text from stdin is appended to it.",
        variable="SMOL_ASK_PROMPT_FILE",
    ),
]


class AskCommand(SmolCommand):
    """Explains what to do with a question that begins with a dash or is not in quotes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as exc:
            if (hint := self._hint(given, str(exc))) is not None:
                raise UsageError(hint) from exc
            raise

    def _hint(self, given: list[str], error: str) -> str | None:
        flags = {flag for p in self.params for flag in (*p.opts, *p.secondary_opts)}
        has_flags = any(arg.partition("=")[0] in flags for arg in given)
        if "--" in given:
            rest = given[given.index("--") + 1 :]
            if "unexpected extra argument" not in error:
                return None
            if late := next((arg for arg in rest if arg.partition("=")[0] in flags), None):
                return f"-- ends the options; put {late} before it"
            return f"put the question in quotes: smol ask -- {shlex.quote(' '.join(rest))}"
        whole = shlex.quote(" ".join(given))
        for arg in given:
            is_flag = arg in flags or (arg.startswith("--") and len(arg.split()) == 1)
            if arg.startswith("-") and not is_flag:
                question = shlex.quote(arg) if has_flags else whole
                return (
                    f"{arg!r} looks like an option; put -- before a question that begins "
                    f"with a dash: smol ask -- {question}"
                )
        if "unexpected extra argument" in error:
            example = '"What is gravity?"' if has_flags else whole
            return f"put the question in quotes: smol ask {example}"
        return None


COMMAND_CLASS = AskCommand


@with_option_groups
def ask(
    *,
    ctx: typer.Context,
    question: Question = None,
    prompt_file: PromptFile = None,
    as_json: AsJson = False,
    generation: GenerationOptions,
    schema: Schema = None,
    engine: EngineOptions,
    remote: ViaOptions,
) -> None:
    """Answer one question. The answer is streamed if stdout is a terminal."""
    from smolcli.backends.base import WAKE_INTERVAL_S
    from smolcli.batch.status_line import waiting

    query = prompt_query(
        "ask",
        _question(question, prompt_file),
        generation.query_defaults(answers=read_schema(schema)),
    )
    log_to_stderr()
    servers = remote.settings(ctx, engine.settings())
    open_backend = ctx.obj or backend_opener(servers, starts_fast=True)
    with waiting("starting"):
        backend = open_backend(engine.settings())
    streamed = _StreamedText() if sys.stdout.isatty() and not as_json else None
    try:
        with closing(backend):
            future = backend.submit(query, streamed.add if streamed else None)
            while not future.done():
                wait([future], timeout=WAKE_INTERVAL_S)
            result = future.result()
    finally:
        if streamed:
            streamed.end()
    if result.is_error:
        raise RunError(str(result.error))
    if as_json:
        typer.echo(json.dumps(result.record(), ensure_ascii=False))
    elif streamed is None:
        typer.echo(result.response)


class _StreamedText:
    """Prints an answer as it is generated; an error or a shell prompt after it has its own line."""

    def __init__(self) -> None:
        self._is_empty = True

    def add(self, text: str) -> None:
        self._is_empty = False
        typer.echo(text, nl=False)

    def end(self) -> None:
        if not self._is_empty:
            typer.echo("")


def _question(question: str | None, prompt_file: Path | None) -> str:
    """The question: of the argument or the file, followed by the text on stdin, if any."""
    if prompt_file is not None:
        if question is not None:
            raise UsageError("QUESTION and --prompt-file cannot be combined")
        question = read_text("--prompt-file", prompt_file)
    if question is None and sys.stdin.isatty():
        raise UsageError(f"no question given; {_TRY}")
    if question in (None, "-"):
        question = _read_stdin()
    elif is_redirected(sys.stdin) and (text := _read_stdin().strip()):
        question = f"{question}\n\n{text}"
    require_utf8("the question", question)
    if not question.strip():
        raise UsageError(f"the question is empty; {_TRY}")
    return question


def _read_stdin() -> str:
    return sys.stdin.buffer.read().decode(errors="surrogateescape")
