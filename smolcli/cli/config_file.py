"""The config file, which sets options that neither a flag nor an environment variable sets."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from smolcli.cli.argument_conversion import convert_plain_values
from smolcli.cli.option_sources import InvalidValue
from smolcli.cli.options import variable_of
from smolcli.errors import UsageError, closest, error_reason


def find_config(given: Path | None) -> Path | None:
    """The config file to read: the given one, else the user's `config.toml` if it exists.

    A home directory that belongs to another user, as after `sudo -u` or in a container, has none.
    """
    default = Path(typer.get_app_dir("smol")) / "config.toml"
    return given or (default if os.path.isfile(default) else None)


def load_config(path: Path, ctx: typer.Context) -> dict[str, dict[str, Any]]:
    """Read a config file into option defaults for each command.

    Top-level keys apply to every command that has the option with its usual meaning and variable;
    a table applies to the command of the same name. Keys are flags without the leading dashes,
    values are what the flag takes.

    Args:
        path: a TOML file.
        ctx: context of the `smol` group, which knows the commands.

    Returns:
        For each command, values by parameter name.

    Raises:
        UsageError: the file cannot be read, or a key or value is invalid.
    """
    values = _read(path)
    commands = getattr(ctx.command, "commands", {})
    options = {name: _options(command) for name, command in commands.items()}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    shared = {key: value for key, value in values.items() if key not in tables}
    _reject_unknown(tables, [n for n in options if options[n]], f"{path}: unknown command")
    _reject_unknown(shared, {k for known in options.values() for k in known if _is_usual(known[k])},
                    f"{path}: unknown option")  # fmt: skip
    defaults = {}
    for name, known in options.items():
        own = tables.get(name, {})
        _reject_unknown(own, known, f"{path}: smol {name} has no option")
        usual = {k: v for k, v in shared.items() if k in known and _is_usual(known[k])}
        given = usual | own
        defaults[name] = {known[k].name: _validated(known[k], v, ctx, path)
                          for k, v in given.items()}  # fmt: skip
    return defaults


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as exc:
        raise UsageError(f"cannot read the config file {path}: {error_reason(exc)}") from exc
    except ValueError as exc:  # invalid TOML or invalid UTF-8
        raise UsageError(f"the config file {path} is not valid TOML: {exc}") from exc


def _options(command: Any) -> dict[str, Any]:
    """The parameters of a command that have an environment variable, by flag name."""
    parameters = [p for p in convert_plain_values(command.params) if p.envvar]
    return {p.opts[0].removeprefix("--"): p for p in parameters}


def _is_usual(option: Any) -> bool:
    """Whether an option means what its flag means in other commands."""
    variables = [option.envvar] if isinstance(option.envvar, str) else option.envvar
    return variable_of(option.opts[0]) in variables


def _reject_unknown(given: Iterable[str], known: Iterable[str], message: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            near = closest(key, known)
            hint = f"; did you mean {near!r}?" if near else ""
            raise UsageError(f"{message} {key!r}{hint}")


def _validated(option: Any, value: Any, ctx: typer.Context, path: Path) -> Any:
    """A value as text, which is what flags take, after the option has accepted it."""
    key = option.opts[0].removeprefix("--")
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple:
        raise UsageError(f"{path}: {key} takes one value, not a list")
    if any(isinstance(each, list | dict) for each in values):
        raise UsageError(f"{path}: {key} takes text or a number, not a table or a nested list")
    texts = [str(each) for each in values]
    if any("\0" in each for each in texts):
        raise UsageError(f"{path}: {key} must not contain a null character")  # as flags cannot
    text = texts if option.multiple else texts[0]
    try:
        option.process_value(ctx, text)
    except InvalidValue as exc:
        raise UsageError(f"{path}: {key} {exc.message}") from exc
    return text
