"""`smol ask`: one question."""

import json
import sys
from concurrent.futures import wait
from contextlib import closing

import typer

from smolcli.cli.commands import backend_opener, log_to_stderr
from smolcli.cli.options import grouped, refuse_no_text
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.files import AsJson, Question
from smolcli.cli.options.generation import GenerationOptions
from smolcli.cli.options.remote import ViaOptions
from smolcli.cli.options.schema import Schema, read_format
from smolcli.errors import QueryError, RunError, UsageError
from smolcli.settings import QueryDefaults
from smolcli.types import Query

EXAMPLES = (
    '[bold]smol ask "What is gravity?"[/bold]\n\n'
    '[bold]smol ask --system "Answer in French." --json - < question.txt[/bold]'
)


@grouped
def ask(
    *,
    ctx: typer.Context,
    question: Question = None,
    as_json: AsJson = False,
    schema: Schema = None,
    generation: GenerationOptions,
    engine: EngineOptions,
    remote: ViaOptions,
) -> None:
    """Answer one question."""
    query = _query(question, generation.query_defaults(answers=read_format(schema)))
    log_to_stderr()
    open_backend = backend_opener(remote.settings(engine.settings()))
    with closing((ctx.obj or open_backend)(engine.settings())) as backend:
        streams = sys.stdout.isatty() and not as_json
        future = backend.submit(query, _show if streams else None)
        while not future.done():
            wait([future], timeout=0.2)  # one without an end cannot be interrupted on Windows
        result = future.result()
    if result.is_error:
        raise RunError(str(result.error))
    if as_json:
        typer.echo(json.dumps(result.record(), ensure_ascii=False))
    else:
        typer.echo("" if streams else result.response)


def _query(question: str | None, defaults: QueryDefaults) -> Query:
    from smolcli.protocol.query import parse_query

    if question is None and sys.stdin.isatty():
        raise UsageError("ask what? Give a question, or - to read it from stdin")
    if question in (None, "-"):
        question = sys.stdin.buffer.read().decode(errors="surrogateescape")
    refuse_no_text("the question", question)
    try:
        return parse_query({"chat_id": "ask", "user_prompt": question}, defaults)
    except QueryError as exc:
        raise UsageError(str(exc)) from exc


def _show(text: str) -> None:
    typer.echo(text, nl=False)
