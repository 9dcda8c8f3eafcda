"""The documentation matches the program."""

from dataclasses import fields

import typer

from smolcli.cli.commands.serve import ServeOptions
from smolcli.cli.main import app
from smolcli.server.errors import HttpCode
from smolcli.types import ErrorCode
from tools.reference import PAGE, page

# Codes that occur only in files, or that no client receives.
ONLY_ELSEWHERE = {ErrorCode.DUPLICATE_CHAT_ID, ErrorCode.LINE_TOO_LONG, ErrorCode.CANCELLED}


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `make docs`"


def test_serving_page_lists_every_option_and_error_code() -> None:
    text = (PAGE.parent / "serving.md").read_text("utf-8")
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    ours = {field.name for field in fields(ServeOptions)}
    flags = {(p.secondary_opts or p.opts)[0] for p in serve.params if p.name in ours}
    assert {flag for flag in flags if f"`{flag}`" not in text} == set()
    codes = {*HttpCode, *ErrorCode} - ONLY_ELSEWHERE
    assert {code for code in codes if f"`{code}`" not in text} == set()


def test_every_command_has_an_example_and_every_option_a_help() -> None:
    groups = [typer.main.get_command(app)]
    for group in groups:
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            assert command.help, name
            assert all(p.help for p in command.params), name
            if hasattr(command, "commands"):
                groups.append(command)
            else:
                assert f"smol {name}" in command.epilog or f" {name}" in command.epilog, name
