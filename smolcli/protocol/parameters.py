"""Validates the parameters of a request; an error names the parameter at fault by its path."""

from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from smolcli.errors import QueryError
from smolcli.protocol.fields import did_you_mean
from smolcli.protocol.json_text import shorten
from smolcli.types import ErrorCode

MAX_ERRORS = 1000  # to choose from; further ones belong to further members of the same object

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], value: object) -> M:
    """Validate the body of a request.

    Args:
        model: describes the parameters.
        value: the parsed JSON body.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    if not isinstance(value, dict):
        raise QueryError("the body must be a JSON object", ErrorCode.NOT_AN_OBJECT)
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise _parameter_error(exc, model) from None


def _parameter_error(exc: ValidationError, model: type[BaseModel]) -> QueryError:
    """The error for the first invalid parameter; unknown parameters come first.

    Args:
        exc: the error that validation raised.
        model: describes the whole object.
    """
    errors = exc.errors(include_url=False, include_context=False)
    top = [f for f in errors if len(f["loc"]) == 1 and f["type"] == "extra_forbidden"] or errors
    same = [f for f in top[:MAX_ERRORS] if f["loc"][0] == top[0]["loc"][0]]
    # A union reports an error for each of its types; take the one that validated furthest.
    error = max(same, key=lambda f: _depth(_place(model, f["loc"])[0], f["type"]))
    location, members = _place(model, error["loc"])
    kind, given = error["type"], error["input"]
    if kind.startswith("union_tag") and isinstance(given, dict):  # the type of a response_format
        location.append("type")
        kind = "literal_error" if kind == "union_tag_invalid" else "missing"
        given = given.get("type")
    path = json_path(location)
    if kind == "missing":
        return QueryError(f"{path} is required", ErrorCode.MISSING_FIELD, path)
    if kind == "extra_forbidden":
        hint = did_you_mean(str(location[-1]), members)
        message = f"{path} is not supported{hint}"
        code = ErrorCode.UNKNOWN_FIELD if len(location) == 1 else ErrorCode.INVALID_VALUE
        return QueryError(message, code, path)
    if len(location) > 1 and kind == "literal_error" and isinstance(given, str):
        message = f"{path} {shorten(given)!r} is not supported"
        return QueryError(message, ErrorCode.INVALID_VALUE, path)
    return invalid_parameter(str(location[0]), model, path)


def _depth(location: list[int | str], kind: str) -> tuple[int, list[int]]:
    """How far into a value an error is: the length of its location, then its indices.

    A wrong type of a tagged union is inside of its object.
    """
    length = len(location) + kind.startswith("union_tag")
    return length, [step for step in location if isinstance(step, int)]


# The keys and indices of an error, and the members that the object at fault can have.
Place = tuple[list[int | str], list[str]]


def _place(model: type[BaseModel], location: Sequence[int | str]) -> Place:
    """Where an error is.

    Args:
        model: describes the whole object.
        location: as pydantic reports it, with labels for the types of unions.
    """
    steps = [step for step in location if step != "[key]"]
    return next(_places(model, steps), ([location[0]], []))


def _places(kind: Any, steps: Sequence[int | str]) -> Iterator[Place]:
    """The places in a value of a type that a location may mean."""
    if not steps:
        yield [], []
    elif get_origin(kind) is Annotated:
        yield from _places(get_args(kind)[0], steps)
    elif get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        labeled = [each for each in kinds if steps[0] in _labels(each)]
        for each in labeled or kinds:
            yield from _places(each, steps if len(kinds) == 1 else steps[1:])
    elif get_origin(kind) in (list, dict):
        for path, members in _places(get_args(kind)[-1], steps[1:]):
            yield [steps[0], *path], members
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {info.alias or name: info.annotation for name, info in kind.model_fields.items()}
        for path, members in _places(fields.get(str(steps[0])), steps[1:]):
            yield [steps[0], *path], members or list(fields)


def _labels(kind: Any) -> list[Any]:
    """The labels of a type in a tagged union."""
    metadata = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    tags = [each.tag for each in metadata if isinstance(each, Tag)]
    tag_field = getattr(kind, "model_fields", {}).get("type")
    return tags if tag_field is None else [*tags, *get_args(tag_field.annotation)]


def invalid_parameter(name: str, model: type[BaseModel], path: str | None = None) -> QueryError:
    """The error for a parameter whose value its description does not allow.

    Args:
        name: the parameter's name.
        model: describes the whole object.
        path: where in the parameter the error is; by default the parameter itself.
    """
    path = path or name
    description = model.model_fields[name].description
    where = f" (at {path})" if path != name else ""
    message = f"{name} must be {description}{where}"
    return QueryError(message, ErrorCode.INVALID_VALUE, path)


def json_path(location: Sequence[int | str]) -> str:
    """A location inside a JSON value as text: `messages[1].content`."""
    path = "".join(f"[{at}]" if isinstance(at, int) else f".{shorten(at)}" for at in location)
    return path.removeprefix(".")
