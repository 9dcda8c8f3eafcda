"""Options that several commands share, each declared once: flag, help, default and variable.

Related options form a frozen dataclass. A command takes such a group as one parameter, and
`with_option_groups` expands it into the options of the command line. Options that only one command
has are declared next to that command.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from smolcli.errors import UsageError, error_reason


def require_utf8(name: str, text: str | None) -> None:
    """Reject an argument that is not valid UTF-8; Python passes such bytes as lone surrogates.

    Args:
        name: what the error message calls the argument.
        text: its value, if any.

    Raises:
        UsageError: the argument contains invalid bytes.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"{name} is not UTF-8") from exc


def read_text(name: str, path: Path) -> str:
    """The text of a file that an option names, without line ends after it.

    Args:
        name: the option, for the error message.
        path: the file, in UTF-8 with or without a byte order mark.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").rstrip("\r\n")
    except OSError as exc:
        raise UsageError(f"{name} {path}: cannot read the file: {error_reason(exc)}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{name} {path}: the file is not UTF-8") from exc


def variable_of(flag: str) -> str:
    """The environment variable that a flag usually has."""
    return f"SMOL_{flag.removeprefix('--').replace('-', '_').upper()}"


def option(
    *flags: str,
    help: str,
    metavar: str | None = None,
    panel: str = "Options",
    alias: str | None = None,
    variable: str | None = None,
    min: int | None = None,
    max: int | None = None,
    completion: Callable[[str], list[str]] | None = None,
) -> Any:
    """Declare an option that can also be set by the environment variable `SMOL_<NAME>`.

    Args:
        flags: the long flag, then short ones.
        help: one sentence, with the unit of the value.
        metavar: placeholder for the value in the help; by default its type.
        panel: heading that the help lists the option under.
        alias: another environment variable that sets the option.
        variable: the variable to use instead, if the flag means something else in another command.
        min: smallest valid value.
        max: largest valid value.
        completion: returns completions of a partial value for the shell.
    """
    variable = variable or variable_of(flags[0].partition("/")[0])
    return typer.Option(
        *flags,
        help=help,
        metavar=metavar,
        envvar=[variable, alias] if alias else variable,
        min=min,
        max=max,
        rich_help_panel=panel,
        autocompletion=completion,
    )


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Expand every parameter whose type is a dataclass into one option per field."""
    parameters = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    expanded: list[inspect.Parameter] = []
    for parameter in parameters:
        if parameter.name in groups:
            expanded += _parameters(groups[parameter.name])
        else:
            expanded.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    call.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    return call


def _parameters(group: Any) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in fields(group)
    ]


AsJson = Annotated[bool, option("--json", help="Print the result as JSON.")]
