"""The file of settings: what an option is where neither flag nor environment says."""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from smolcli.errors import UsageError


def config_file(given: Path | None) -> Path | None:
    """The file to read: the given one, else the user's own, None where there is none."""
    own = Path(typer.get_app_dir("smol")) / "config.toml"
    return given or (own if own.is_file() else None)


def load_config(path: Path, ctx: typer.Context) -> dict[str, dict[str, Any]]:
    """Defaults for each command: top-level keys for all, a table's for the command of its name.

    Keys are flags without their dashes; values are what would be typed after them.

    Raises:
        UsageError: the file cannot be read, or holds a key or value that no option has.
    """
    values = _read(path)
    commands = getattr(ctx.command, "commands", {})
    options = {name: _options(command) for name, command in commands.items()}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for_all = {key: value for key, value in values.items() if key not in tables}
    _refuse_unknown(tables, [n for n in options if options[n]], f"{path}: there is no command")
    _refuse_unknown(for_all, {key for known in options.values() for key in known},
                    f"{path}: there is no option")  # fmt: skip
    found = {}
    for name, known in options.items():
        own = tables.get(name, {})
        _refuse_unknown(own, known, f"{path}: smol {name} has no option")
        given = {key: value for key, value in for_all.items() if key in known} | own
        found[name] = {known[k].name: _checked(known[k], v, ctx, path) for k, v in given.items()}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise UsageError(f"the config file {path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:  # of tomllib and of UTF-8
        raise UsageError(f"the config file {path} is no TOML: {exc}") from exc


def _options(command: Any) -> dict[str, Any]:
    """A command's parameters that have an environment variable, by their flag's name."""
    parameters = [p for p in command.params if p.envvar]
    return {p.opts[0].removeprefix("--"): p for p in parameters}


def _refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{what} {key!r}{hint}")


def _checked(option: Any, value: Any, ctx: typer.Context, path: Path) -> Any:
    """A value as text, as flags have it, once the option has understood it."""
    text = [str(item) for item in value] if isinstance(value, list) else str(value)
    if option.multiple and isinstance(text, str):
        text = [text]
    key = option.opts[0].removeprefix("--")
    if isinstance(text, list) and not option.multiple:
        raise UsageError(f"{path}: {key} takes one value, not a list")
    try:
        option.process_value(ctx, text)
    except typer.BadParameter as exc:
        raise UsageError(f"{path}: {key} = {value!r}: {exc.message}") from exc
    return text
