"""Commands that convert the plain values of a command line without pydantic.

Typer converts every value with pydantic, whose import takes longer than anything else that a short
command does. Text, numbers, choices and absent values need no help. Everything else, invalid values
included, is still left to Typer.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from smolcli.cli.help_layout import ReadableHelp
from smolcli.cli.option_sources import (
    InvalidValue,
    add_sources,
    as_usage_error,
    misspelled_variables,
    reject_blank_lists,
)
from smolcli.errors import SmolError

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
DECIMAL_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")


class NotPlain(Exception):
    """A value has to be converted by Typer."""


class SmolCommand(ReadableHelp, TyperCommand):
    """A command that converts plain values itself, and whose errors say where a value was set."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, those that Typer adds included."""
        return convert_plain_values(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except InvalidValue as exc:
            raise as_usage_error(exc, ctx) from exc
        reject_blank_lists(ctx)
        return rest

    def invoke(self, ctx: Any) -> Any:
        if not ctx.params.get("quiet"):
            for name, meant in misspelled_variables(self, ctx.find_root().command):
                note = f"{name} in the environment has no effect; did you mean {meant}?"
                typer.echo(f"smol: {note}", err=True)
        try:
            return super().invoke(ctx)
        except SmolError as exc:
            add_sources(exc, ctx)
            raise


def convert_plain_values(parameters: list[Any]) -> list[Any]:
    """Make Typer's parameters convert plain values themselves; returns them."""
    for parameter in parameters:
        convert = getattr(parameter, "get_runtime_param", None)  # other versions have none
        if convert is not None and not isinstance(getattr(convert, "__self__", 0), PlainConversion):
            parameter.get_runtime_param = PlainConversion(convert).itself
    return parameters


class PlainConversion:
    """Converts the values of a parameter in Typer's place, or asks Typer.

    Args:
        typer_conversion: returns Typer's own conversion, which imports pydantic.
    """

    def __init__(self, typer_conversion: Callable[[], Any]) -> None:
        self._typer_conversion = typer_conversion

    def itself(self) -> "PlainConversion":
        """This object; called by Typer."""
        return self

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Convert a value; called by Typer.

        Raises:
            InvalidValue: Typer rejects the value, or it is an empty path.
        """
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        if value == "" and param.type_descriptor.annotation is Path:
            raise InvalidValue(value, param, "it is empty")  # Path("") is the current directory
        try:
            return plain_value(value, param.type_descriptor.annotation, param.min, param.max)
        except NotPlain:
            try:
                return self._typer_conversion().coerce(value, param=param, ctx=ctx)
            except typer.BadParameter as exc:
                raise InvalidValue(value, param, exc.message) from exc


def plain_value(value: Any, annotation: Any, low: float | None, high: float | None) -> Any:
    """Convert the value of an option.

    Args:
        value: text, or a default value of the annotated type.
        annotation: the option's type.
        low: smallest valid number.
        high: largest valid number.

    Raises:
        NotPlain: the value or the type is not plain, or the value is invalid.
    """
    if annotation is str and type(value) is str:
        return value
    if get_origin(annotation) is Literal and value in get_args(annotation):
        return value
    if annotation is Path:
        return Path(value)  # Typer would reject a file that is not readable, even as an output
    patterns = {int: WHOLE_NUMBER, float: DECIMAL_NUMBER}
    if annotation not in patterns:
        raise NotPlain
    if type(value) is str and patterns[annotation].fullmatch(value):
        value = annotation(value)
    is_inside = type(value) is annotation and (low is None or low <= value)
    if not is_inside or (high is not None and value > high):
        raise NotPlain
    return value
