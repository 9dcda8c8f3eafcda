"""Options for how answers are generated, and for the schema that they must follow."""

import functools
import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from smolcli.cli.options import option, read_text, require_utf8
from smolcli.errors import QueryError, UsageError, error_reason
from smolcli.protocol.json_text import load_json
from smolcli.settings import DEFAULT_SEED, OPENAI_TEMPERATURE, QueryDefaults
from smolcli.types import AnswerFormat, Sampling

_DEFAULTS = Sampling()
_WITHOUT_PARSER = {"max_new_tokens", "system_prompt", "system_file"}  # need no pydantic
_generation = functools.partial(option, panel="Generation")

Schema = Annotated[
    str | None,
    _generation(
        "--schema",
        metavar="SCHEMA",
        help="JSON Schema that answers must follow: a file, a pydantic model as module:Class, or "
        "the schema itself as JSON.",
    ),
]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Defaults for queries that do not set these fields; fields are named as a query's."""

    max_new_tokens: Annotated[
        int,
        _generation("--max-new-tokens", metavar="N", help="Maximum length of an answer in tokens."),
    ] = _DEFAULTS.max_new_tokens
    temperature: Annotated[
        float | None,
        _generation(
            "--temperature",
            metavar="T",
            help="Sampling temperature. Default: 0, which is greedy decoding.",
        ),
    ] = None
    top_p: Annotated[
        float,
        _generation(
            "--top-p",
            metavar="P",
            help="Sample from the smallest set of tokens with this total probability.",
        ),
    ] = _DEFAULTS.top_p
    top_k: Annotated[
        int,
        _generation(
            "--top-k", metavar="K", help="Sample from the K most likely tokens. 0: all tokens."
        ),
    ] = _DEFAULTS.top_k
    repetition_penalty: Annotated[
        float,
        _generation(
            "--repetition-penalty",
            metavar="X",
            help="Penalty for tokens that already occurred. 1: none.",
        ),
    ] = _DEFAULTS.repetition_penalty
    min_p: Annotated[
        float,
        _generation(
            "--min-p",
            metavar="P",
            help="Exclude tokens less likely than this fraction of the most likely one.",
        ),
    ] = _DEFAULTS.min_p
    presence_penalty: Annotated[
        float,
        _generation(
            "--presence-penalty",
            metavar="X",
            help="Penalty from -2 to 2 for tokens that the answer already contains.",
        ),
    ] = _DEFAULTS.presence_penalty
    frequency_penalty: Annotated[
        float,
        _generation(
            "--frequency-penalty",
            metavar="X",
            help="Penalty from -2 to 2 for each time that the answer contains a token.",
        ),
    ] = _DEFAULTS.frequency_penalty
    min_tokens: Annotated[
        int,
        _generation("--min-tokens", metavar="N", help="Minimum length of an answer in tokens."),
    ] = _DEFAULTS.min_tokens
    ignore_eos: Annotated[
        bool,
        _generation(
            "--ignore-eos",
            help="Continue after the model ends its answer, up to the token limit. For benchmarks.",
        ),
    ] = _DEFAULTS.ignore_eos
    seed: Annotated[
        int | None,
        _generation("--seed", metavar="N", help="Random seed. Default: a new one for each run."),
    ] = None
    system_prompt: Annotated[
        str | None,
        _generation(
            "--system",
            metavar="TEXT",
            help="System prompt for queries without one. Default: the model's own.",
        ),
    ] = None
    system_file: Annotated[
        Path | None,
        _generation(
            "--system-file", metavar="FILE", help="Read the system prompt from a file, in UTF-8."
        ),
    ] = None

    @property
    def given_seed(self) -> int | None:
        """The seed; None picks one at random."""
        return None if self.seed == DEFAULT_SEED else self.seed

    def query_defaults(
        self,
        extra_fields: Literal["error", "ignore", "keep"] = "error",
        answers: AnswerFormat | None = None,
    ) -> QueryDefaults:
        """The defaults that these options stand for, validated as the fields of a query.

        Args:
            extra_fields: what to do with unknown fields of a query.
            answers: format of the answers, if any.

        Raises:
            UsageError: a value is invalid; the message names the option.
        """
        system_prompt = self._system_prompt()
        seed = _random_seed() if self.given_seed is None else self.given_seed
        several = OPENAI_TEMPERATURE if self.temperature is None else self.temperature
        return QueryDefaults(
            sampling=replace(self._sampling(), seed=seed),
            system_prompt=system_prompt,
            extra_fields=extra_fields,
            format=answers,
            several_temperature=several,
        )

    def _sampling(self) -> Sampling:
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        if changed <= _WITHOUT_PARSER and self.max_new_tokens > 0:
            return replace(_DEFAULTS, max_new_tokens=self.max_new_tokens)
        from smolcli.protocol.query import parse_query  # late: imports pydantic

        if self.max_new_tokens < 1:
            raise UsageError("--max-new-tokens must be a positive integer")
        query = {"chat_id": "-", "user_prompt": "-"} | asdict(self)
        del query["system_prompt"], query["system_file"]
        try:
            return parse_query(query, QueryDefaults()).sampling
        except QueryError as exc:
            field = exc.field or ""
            flag = f"--{field.replace('_', '-')}"
            raise UsageError(str(exc).replace(field, flag, 1) if field else str(exc)) from exc

    def _system_prompt(self) -> str | None:
        if self.system_file is None:
            require_utf8("--system", self.system_prompt)
            return self.system_prompt
        if self.system_prompt is not None:
            raise UsageError("--system and --system-file cannot be combined")
        return read_text("--system-file", self.system_file)


def _random_seed() -> int:
    """A random seed below 2**31. The modules `random` and `secrets` take long to import."""
    return int.from_bytes(os.urandom(4), "little") >> 1


def read_schema(schema: str | None) -> AnswerFormat | None:
    """The answer format that the value of --schema stands for; None without one.

    Raises:
        UsageError: the schema cannot be read, is invalid, or is not supported.
    """
    if schema is None:
        return None
    if not schema:
        raise UsageError("--schema must not be empty")
    from smolcli.protocol.answer_formats import schema_format  # late: imports pydantic
    from smolcli.text.grammar import check_format

    if schema.lstrip().startswith("{"):
        definition, shown = _from_text(schema, "--schema"), "--schema"
    elif _names_model(schema):
        definition, shown = _from_model(schema), f"--schema {schema}"
    else:
        definition, shown = _from_file(Path(schema)), f"--schema {schema}"
    try:
        check_format(answers := schema_format(definition))
    except QueryError as exc:
        raise UsageError(f"{shown}: {exc}") from exc
    return answers


def _names_model(schema: str) -> bool:
    module, _, name = schema.partition(":")
    is_dotted = all(part.isidentifier() for part in module.split("."))
    return is_dotted and name.isidentifier() and not Path(schema).exists()


def _from_model(schema: str) -> dict[str, Any]:
    """The schema of a pydantic model, or of any other type that pydantic supports."""
    from smolcli.protocol.answer_formats import model_schema

    module, _, name = schema.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as with python -m, unlike a console script
    try:
        return model_schema(getattr(importlib.import_module(module), name))
    except Exception as exc:  # the module is the user's code and may raise anything
        reason = " ".join(str(exc).split())[:200]
        raise UsageError(f"--schema {schema}: {type(exc).__name__}: {reason}") from exc
    finally:
        sys.path.remove(str(Path.cwd()))


def _from_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as exc:
        reason = error_reason(exc)
        raise UsageError(f"--schema {path}: cannot read the file: {reason}") from exc
    return _from_text(text, f"--schema {path}")


def _from_text(text: str | bytes, shown: str) -> dict[str, Any]:
    try:
        decoded = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        definition = load_json(decoded.encode())
    except (QueryError, UnicodeError) as exc:
        raise UsageError(f"{shown}: {exc}") from exc
    if not isinstance(definition, dict):
        raise UsageError(f"{shown} must contain a JSON object")
    return definition
