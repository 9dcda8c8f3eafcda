"""Writes docs/reference.md from the command line itself: python -m tools.reference."""

import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from smolcli.cli.main import app

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """\
# smol(1)

`smol [--config FILE] COMMAND [OPTIONS]`

Made from the program itself by `make docs`; `smol COMMAND --help` says the same.
"""
TAIL = """\
## Where an option's value comes from

The flag; else its environment variable, `SMOL_` and the flag's name; else the config file; else
the default. The config file is the one that `--config` or `SMOL_CONFIG` names, else `config.toml`
in the user's own folder: `~/.config/smol` (or in `XDG_CONFIG_HOME`) on Linux,
`~/Library/Application Support/smol` on macOS, `%APPDATA%\\smol` on Windows. `--config /dev/null`
is none. Its keys are flags without their dashes. At the top they hold for every command that has
the option, in a table for one command:

```toml
dtype = "float32"
max-new-tokens = 128

[serve]
port = 9000
api-key = ["first", "second"]
```

A key that no command has is an error, and so is a value that the option does not take.

## Exit codes

| code | |
|---|---|
| 0 | every line answered |
| 1 | the run failed; what is written stays |
| 2 | wrong usage |
| 3 | finished, some lines failed |
| 130 | interrupted |

## Files

| path | |
|---|---|
| `~/.cache/smolcli/models` | the model store; `SMOL_HOME` moves `~/.cache/smolcli` |
| `~/.cache/smolcli/chat_history` | what was typed into `smol chat` |
| `OUTPUT.manifest.json` | how an output was made; a run goes on by it |
"""


def page() -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    parts = [HEAD, *_options(group), *_commands(group, "smol"), TAIL]
    return "\n".join(parts)


def _commands(group: Any, prefix: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield from _command(command, f"{prefix} {name}")


def _command(command: Any, name: str) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    names = [f"[{_metavar(p)}]" if not p.required else _metavar(p) for p in arguments]
    yield f"## {name}\n"
    yield f"`{' '.join([name, *names, '[OPTIONS]'])}`\n"
    yield f"{inspect.cleandoc(command.help)}\n"
    for argument in arguments:
        yield f"- `{_metavar(argument)}`: {argument.help}"
    if arguments:
        yield ""
    yield from _options(command)
    yield f"{_plain(command.epilog)}\n"


def _options(command: Any) -> Iterator[str]:
    """A table for each panel."""
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    shown = [p for p in options if p.name not in ("help", "install_completion", "show_completion")]
    for panel, members in groupby(shown, key=lambda p: p.rich_help_panel or "Options"):
        yield f"| {panel} | | default |\n|---|---|---|"
        yield from map(_row, members)
        yield ""


def _row(option: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
    variables = option.envvar or []
    variables = [variables] if isinstance(variables, str) else variables
    beside = [v for v in variables if v != f"SMOL_{option.opts[0][2:].upper().replace('-', '_')}"]
    extra = f" Also `{'`, `'.join(beside)}`." if beside else ""
    is_bare = option.default is None or option.default is False
    default = "" if is_bare else f"`{option.default}`"
    text = f"{option.help or ''}{extra}".replace("|", "\\|")
    return f"| {flags}{_values(option)} | {text} | {default} |"


def _values(option: Any) -> str:
    """What a flag takes, where it is one of a few words."""
    choices = option.type_descriptor.choices
    return " " + "\\|".join(map(str, choices)) if choices else ""


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _plain(markup: str | None) -> str:
    return re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", markup or "")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
