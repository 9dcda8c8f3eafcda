"""Every option of every command, once: its flag, help, default and environment variable.

Options that belong together are a frozen group; a command takes a group as one parameter and
`grouped` spreads it out on the command line.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import typer

from smolcli.errors import UsageError


def refuse_no_text(what: str, text: str | None) -> None:
    """Refuse an argument with bytes that are no UTF-8, which Python hands on as lone surrogates.

    Raises:
        UsageError: naming it.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"{what} is not UTF-8") from exc


def option(
    *flags: str,
    help: str,
    panel: str = "Options",
    also: str | None = None,
    least: int | None = None,
    most: int | None = None,
    complete: Callable[[str], list[str]] | None = None,
) -> Any:
    """An option that SMOL_<ITS NAME> sets too, and so does the variable `also`."""
    variable = f"SMOL_{flags[0].partition('/')[0].removeprefix('--').replace('-', '_').upper()}"
    envvar = [variable, also] if also else variable
    return typer.Option(
        *flags,
        help=help,
        envvar=envvar,
        min=least,
        max=most,
        rich_help_panel=panel,
        autocompletion=complete,
    )


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Spread each group among a command's parameters out into its options."""
    parameters = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    spread = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name not in groups] + [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for group in groups.values()
        for field in fields(group)
    ]
    call.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    return call
