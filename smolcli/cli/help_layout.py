"""The help of a command, laid out so that its columns have room on a terminal of 80 columns."""

import copy
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typer._click import Command as Base
else:
    Base = object


class ReadableHelp(Base):
    """Changes how Typer shows parameters in the help and in usage lines.

    Flags and arguments have no type, numbers have no range, choices are listed in the text instead
    of the narrow column of types, and a flag and its opposite share one name.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words of the usage line, without braces around arguments."""
        pieces = super().collect_usage_pieces(ctx)
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        shown: Any = copy.copy(self)
        shown.help = _unwrapped(self.help or "")
        shown.get_params = lambda ctx: [_shown(p) for p in self.get_params(ctx)]
        super(ReadableHelp, shown).format_help(ctx, formatter)


def _unwrapped(text: str) -> str:
    """A docstring with one line per paragraph; Typer keeps line breaks after the first one."""
    return "\n\n".join(
        " ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n")
    )


def _shown(parameter: Any) -> Any:
    """A copy of a parameter for the help alone."""
    shown = copy.copy(parameter)
    if choices := parameter.type_descriptor.choices:
        shown.help = f"{parameter.help} One of {', '.join(map(str, choices))}."
    if parameter.param_type_name == "argument" or parameter.type_descriptor.annotation is bool:
        shown.display_type_rich = lambda ctx: None
    if parameter.param_type_name == "option":
        shown.min = shown.max = None
    if parameter.secondary_opts:
        if parameter.default is not None:
            shown.default = "on" if parameter.default else "off"
        shown.opts = [parameter.opts[0].replace("--", "--[no-]", 1)]
        shown.secondary_opts = []
    return shown
