"""`smol ask`: answer one question."""

import json
import shlex
import sys
from concurrent.futures import wait
from contextlib import closing
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from smolcli.cli.options import AsJson, require_utf8, with_option_groups
from smolcli.cli.options.backend import ViaOptions, backend_opener
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.generation import GenerationOptions, Schema, read_schema
from smolcli.cli.terminal import is_redirected, log_to_stderr
from smolcli.errors import QueryError, RunError, UsageError
from smolcli.settings import QueryDefaults
from smolcli.types import Query

EXAMPLES = (
    '[bold]smol ask "What is gravity?"[/bold]\n\n'
    '[bold]cat report.txt | smol ask "Summarize this:"[/bold] appends stdin to the question.\n\n'
    '[bold]smol ask --system "Answer in French." --json - < question.txt[/bold]'
)
POLL_S = 0.2  # an unbounded wait cannot be interrupted on Windows

Question = Annotated[
    str | None,
    typer.Argument(
        metavar="QUESTION",
        help="Question to answer. Text from a pipe or a redirected file is appended to it. "
        "Default, and with -: stdin alone.",
    ),
]


class AskCommand(TyperCommand):
    """Explains what to do if a question that begins with a dash is taken for an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as exc:
            flags = {flag for p in self.params for flag in (*p.opts, *p.secondary_opts)}
            for arg in given:
                is_flag = arg in flags or (arg.startswith("--") and len(arg.split()) == 1)
                if arg.startswith("-") and not is_flag:
                    raise UsageError(
                        f"{arg!r} looks like an option; put -- before a question that begins "
                        f"with a dash: smol ask -- {shlex.quote(arg)}"
                    ) from exc
            raise


@with_option_groups
def ask(
    *,
    ctx: typer.Context,
    question: Question = None,
    as_json: AsJson = False,
    generation: GenerationOptions,
    schema: Schema = None,
    engine: EngineOptions,
    remote: ViaOptions,
) -> None:
    """Answer one question. The answer is streamed if stdout is a terminal."""
    from smolcli.batch.progress import waiting

    query = _query(question, generation.query_defaults(answers=read_schema(schema)))
    log_to_stderr()
    open_backend = ctx.obj or backend_opener(remote.settings(ctx, engine.settings()))
    with waiting("starting the backend"):
        backend = open_backend(engine.settings())
    with closing(backend):
        is_streaming = sys.stdout.isatty() and not as_json
        future = backend.submit(query, _print_text if is_streaming else None)
        while not future.done():
            wait([future], timeout=POLL_S)
        result = future.result()
    if result.is_error:
        raise RunError(str(result.error))
    if as_json:
        typer.echo(json.dumps(result.record(), ensure_ascii=False))
    else:
        typer.echo("" if is_streaming else result.response)


def _query(question: str | None, defaults: QueryDefaults) -> Query:
    from smolcli.protocol.query import parse_query

    if question is None and sys.stdin.isatty():
        raise UsageError('no question given; try smol ask "What is gravity?"')
    if question in (None, "-"):
        question = _read_stdin()
    elif is_redirected(sys.stdin) and (text := _read_stdin().strip()):
        question = f"{question}\n\n{text}"
    require_utf8("the question", question)
    try:
        return parse_query({"chat_id": "ask", "user_prompt": question}, defaults)
    except QueryError as exc:
        raise UsageError(str(exc)) from exc


def _read_stdin() -> str:
    return sys.stdin.buffer.read().decode(errors="surrogateescape")


def _print_text(text: str) -> None:
    typer.echo(text, nl=False)
