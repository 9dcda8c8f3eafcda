"""Errors about the values of options, in terms of where each value was set.

A value is set by a flag, an environment variable or the config file. An error about it names that
place, the value and what is allowed.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

from smolcli.errors import SmolError, UsageError, closest, without_credentials
from smolcli.settings import HOME_VARIABLE

_MAX_SHOWN = 100  # characters of a value
_SECRETS = frozenset({"api_key", "upstream_api_key"})
_PREFIX = "SMOL_"
_OURS = re.compile(_PREFIX, re.IGNORECASE)
_FLAG = re.compile(r"--[a-z][a-z-]*")


class InvalidValue(typer.BadParameter):
    """A value that an option does not accept.

    Args:
        value: the value.
        option: the parameter of the command.
        reason: why, in Typer's words.
    """

    def __init__(self, value: object, option: Any, reason: str) -> None:
        allowed = _allowed_values(option)
        super().__init__(
            f"must be {allowed}, not {_shown(value)}" if allowed else f"is invalid: {reason}"
        )
        self.param = option


def as_usage_error(exc: InvalidValue, ctx: Any) -> UsageError:
    """The error for a value on the command line, in the environment or in the config file.

    Args:
        exc: raised by the conversion of the value.
        ctx: the context of the command.
    """
    option: Any = exc.param
    source = ctx.get_parameter_source(option.name)
    place = option.opts[0] if option.param_type_name == "option" else option.metavar
    if source is not None and source.name == "ENVIRONMENT":
        place = f"the environment variable {_variable(option)}"
    return UsageError(f"{place} {exc.message}")


def reject_blank_lists(ctx: Any) -> None:
    """Reject environment variables of repeatable options that contain nothing but spaces.

    Raises:
        UsageError: naming the variable.
    """
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name)
        is_set = source is not None and source.name == "ENVIRONMENT"
        if is_set and option.multiple and not ctx.params.get(option.name):
            raise UsageError(f"the environment variable {_variable(option)} must not be blank")


def misspelled_variables(command: Any, group: Any) -> Iterator[tuple[str, str]]:
    """Environment variables that set nothing, each with the name that was probably meant.

    Those that resemble no option are not meant for smol: in Kubernetes, a service called smol sets
    SMOL_SERVICE_HOST.

    Args:
        command: the command that runs.
        group: the `smol` group, whose other commands are imported only if they may have a variable.
    """
    given = [name for name, value in os.environ.items() if value and _OURS.match(name)]
    known = {HOME_VARIABLE, *_variables(group.params), *_variables(command.params)}
    if known.issuperset(given):
        return
    known.update(_variables(_parameters(group)))
    names = [name.removeprefix(_PREFIX) for name in known if name.startswith(_PREFIX)]
    for name in given:
        near = closest(name.upper().removeprefix(_PREFIX), names, cutoff=0.7)
        if near and name not in known:
            yield name, _PREFIX + near


def _parameters(command: Any) -> Iterator[Any]:
    """The parameters of a command and, if it is a group, of its commands."""
    yield from command.params
    for member in getattr(command, "commands", {}).values():
        yield from _parameters(member)


def _variables(parameters: Iterable[Any]) -> Iterator[str]:
    for parameter in parameters:
        if parameter.envvar:
            yield from _names(parameter)


def add_sources(exc: SmolError, ctx: Any) -> None:
    """Add to an error which of the options that it is about were not set by flags.

    Args:
        exc: the error; its message is changed.
        ctx: the context of the command.
    """
    message = str(exc)
    notes = [
        note
        for option in ctx.command.params
        if (note := _note(option, ctx)) and _is_about(message, option, ctx)
    ]
    if notes:
        exc.args = (f"{message} ({', '.join(notes)})",)


def _note(option: Any, ctx: Any) -> str | None:
    """Where an option was set, if not by a flag."""
    source = ctx.get_parameter_source(option.name)
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return None
    if source.name == "ENVIRONMENT":
        name, place = _variable(option), "the environment"
        value: object = os.environ.get(name)
    else:
        name, place = option.opts[0].removeprefix("--"), str(ctx.find_root().meta.get("config"))
        value = (ctx.default_map or {}).get(option.name)
    is_secret = option.name in _SECRETS
    return f"{name} in {place}" if is_secret else f"{name}={_shown(value)} in {place}"


def _is_about(message: str, option: Any, ctx: Any) -> bool:
    """Whether an error names an option, or begins with its name, or quotes its value."""
    if not set(_FLAG.findall(message)).isdisjoint((*option.opts, *option.secondary_opts)):
        return True
    if message.startswith(f"{option.name} "):
        return True
    if option.name in _SECRETS:
        return False
    values = ctx.params.get(option.name)
    values = values if isinstance(values, list | tuple) else [values]
    return any(
        repr(text) in message or (os.sep in text and text in message)
        for text in (without_credentials(str(v)) for v in values if v not in (None, ""))
    )


def _variable(option: Any) -> str:
    """The environment variable that an option was set by."""
    names = _names(option)
    return next((name for name in names if os.environ.get(name)), names[0])


def _names(option: Any) -> list[str]:
    return [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)


def _shown(value: object) -> str:
    text = without_credentials(repr(value))
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _allowed_values(option: Any) -> str | None:
    """What an option accepts; None if that has no short description."""
    annotation = option.type_descriptor.annotation
    if get_origin(annotation) is not None and option.type_descriptor.choices:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if annotation is bool:
        return "true or false"
    if annotation is Path:
        return "a path"
    if annotation not in (int, float):
        return None
    noun = "an integer" if annotation is int else "a number"
    low, high = option.min, option.max
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    if low is not None:
        return f"{noun} of at least {low}"
    return f"{noun} of at most {high}" if high is not None else noun
