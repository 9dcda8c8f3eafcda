"""Plain values of options are converted as Typer converts them, everything else by Typer."""

from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from smolcli.cli.argument_conversion import NotPlain, SmolCommand, plain_value


@pytest.mark.parametrize(
    ("value", "annotation", "converted"),
    [
        ("8", int, 8),
        ("-1", int, -1),
        (8, int, 8),
        ("0.5", float, 0.5),
        ("2", float, 2.0),
        ("text", str, "text"),
        ("", str, ""),
        ("auto", Literal["auto", "fast"], "auto"),
    ],
)
def test_values_are_converted_by_their_annotation(
    value: object, annotation: object, converted: object
) -> None:
    found = plain_value(value, annotation, None, None)
    assert found == converted
    assert type(found) is type(converted)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("1_000", int),
        (" 8", int),
        ("8.0", int),
        ("\u0663", int),  # an Arabic digit
        (True, int),
        ("1e3", float),
        ("nan", float),
        ("Auto", Literal["auto", "fast"]),
        (8, str),
        ("no", bool),
    ],
)
def test_other_values_are_left_to_typer(value: object, annotation: object) -> None:
    with pytest.raises(NotPlain):
        plain_value(value, annotation, None, None)


@pytest.mark.parametrize("value", ["-1", "11"])
def test_numbers_outside_their_range_are_left_to_typer(value: str) -> None:
    with pytest.raises(NotPlain):
        plain_value(value, int, 0, 10)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--number", "8", "--fraction", "0.25", "--kind", "fast", "--text", "x", "--each", "a"],
        ["--number", "1_0"],
        ["--fraction", "1e-1"],
        ["--each", "a", "--each", "b"],
        ["--flag"],
        ["--unknown"],
    ],
)
def test_a_command_behaves_as_without_conversion(arguments: list[str]) -> None:
    def command(
        number: Annotated[int, typer.Option(min=0, max=10)] = 3,
        fraction: Annotated[float | None, typer.Option()] = None,
        kind: Annotated[Literal["auto", "fast"], typer.Option()] = "auto",
        text: Annotated[str | None, typer.Option()] = None,
        each: Annotated[list[str] | None, typer.Option()] = None,
        flag: Annotated[bool, typer.Option()] = False,
    ) -> None:
        typer.echo(repr((number, fraction, kind, text, each, flag)))

    plain, ours = typer.Typer(), typer.Typer()
    plain.command(name="command")(command)
    ours.command(name="command", cls=SmolCommand)(command)
    expected, result = (CliRunner().invoke(app, arguments) for app in (plain, ours))
    assert (result.exit_code, result.output) == (expected.exit_code, expected.output)
