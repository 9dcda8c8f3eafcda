"""The record of how an output was made, which decides whether a run may resume it."""

import json
import os
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter

from smolcli.atomic import replacing
from smolcli.batch.input_scan import InputScan, RowDigests
from smolcli.errors import ResumeError, SettingsChanged
from smolcli.protocol.json_text import parse_json
from smolcli.protocol.line_formats import SMOL
from smolcli.settings import EngineSettings, RunSettings
from smolcli.types import Sampling

_ALWAYS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_MAY_DIFFER = ("versions", "threads", "device")  # backend values that do not prevent a resume
_MAX_SHOWN = 60  # characters of a value in an error message
_SHOWN_BEFORE = 20  # characters before the first difference


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that determines an output; written before its first line and completed at the end.

    Args:
        input: path of the input.
        input_sha256: digest of the input; None for a stream.
        limit: maximum number of lines to answer.
        seed: seed of the run.
        generation: settings that determine the answers.
        model: `--model` as given.
        dtype: `--dtype` as given.
        created: `created` of answers in OpenAI's format, in seconds since the epoch: the input's
            modification time, so that equal runs give equal bytes.
        errors: path of the file that failed lines are moved to.
        backend: identity of the backend that answered; None if nothing had to be answered.
        statistics: what the run counted; None until it is complete.
        run_id: part of the ids of answers in OpenAI's format; None before 0.2.
        rows: digests of the rows that the output answers, or will answer; None before 0.2.
        files: digests of several input files by name, in order; None for one input.
        table_sha256: digest of the results that the table in a database was written from, if any.
    """

    input: str
    input_sha256: str | None
    limit: int | None
    seed: int
    generation: dict[str, Any]
    model: str
    dtype: str
    created: int = 0
    errors: str | None = None
    backend: dict[str, Any] | None = None
    statistics: dict[str, Any] | None = None
    run_id: str | None = None
    rows: str | None = None
    files: dict[str, str] | None = None
    table_sha256: str | None = None

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @classmethod
    def of(
        cls, settings: RunSettings, scan: InputScan, seed: int, created: int, run_id: str
    ) -> Self:
        """The manifest of a run whose backend is not open yet.

        Args:
            settings: the run's settings.
            scan: facts about the input.
            seed: see `Manifest`.
            created: see `Manifest`.
            run_id: see `Manifest`.
        """
        defaults = settings.defaults
        several = None if scan.format is SMOL else defaults.several_temperature
        generation = _sampling(defaults.sampling) | {
            "system_prompt": defaults.system_prompt,
            "extra_fields": defaults.extra_fields,
            "schema": defaults.format.schema if defaults.format else None,
            "several_temperature": several,
            "timings": settings.with_timings,
            "prompt": settings.rows.prompt,
            "id_column": settings.rows.id_column,
            "fields": list(settings.rows.fields) or None,
        }
        for name in ("input_format", "encoding", "delimiter", "query", "table"):
            if (value := getattr(settings.rows, name)) not in (None, "auto"):
                generation[name] = value
        if digest := settings.engine.chat_template_digest:
            generation["chat_template"] = digest
        if settings.rows.truncate_prompt:
            generation["truncate_prompt"] = True
        del generation["seed"]
        return cls(
            input=str(scan.inputs),
            input_sha256=scan.sha256,
            limit=settings.limit,
            seed=seed,
            created=created,
            generation=generation,
            model=settings.engine.model,
            dtype=settings.engine.dtype,
            errors=os.path.realpath(settings.errors) if settings.errors else None,
            run_id=run_id,
            rows=scan.rows.text if scan.rows is not None else None,
            files=scan.files,
        )

    @property
    def digests(self) -> RowDigests | None:
        """Digests of the input's rows, if they were recorded."""
        return None if self.rows is None else RowDigests.from_text(self.rows)

    def has_model_of(self, engine: EngineSettings) -> bool:
        """Whether `--model` and `--dtype` have the same values."""
        return (self.model, self.dtype) == (engine.model, engine.dtype)

    def check_same(self, new: "Manifest", output: Path) -> None:
        """Check that a run described by `new` would give the same answers.

        Raises:
            SettingsChanged: naming every setting that differs.
        """
        changes = [
            *_differences(self._settings(), new._settings(), ""),
            *_differences(*_common(self._identity(), new._identity()), "the server's "),
        ]
        if changes:
            listed = "; ".join(changes)
            raise SettingsChanged(
                f"{output} was made with other settings: {listed}; "
                "choose another --output, or start over with --overwrite",
                listed,
            )

    def with_rows_of(self, previous: "Manifest") -> "Manifest":
        """This manifest with the digests that `previous` has beyond a smaller `--limit`."""
        old, new = previous.digests, self.digests
        if old is None or new is None:
            return self
        return replace(self, rows=new.extended(old).text)

    def version_changes(self, new: "Manifest") -> str:
        """A list of the package versions that differ, empty if none do."""
        old_versions = (self.backend or {}).get("versions", {})
        new_versions = (new.backend or {}).get("versions", {})
        return ", ".join(
            f"{name} {old_versions.get(name)} -> {version}"
            for name, version in sorted(new_versions.items())
            if old_versions.get(name) != version
        )

    def _settings(self) -> dict[str, Any]:
        return {"seed": self.seed} | self.generation

    def _identity(self) -> dict[str, Any]:
        return {k: v for k, v in (self.backend or {}).items() if k not in _MAY_DIFFER}


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Sampling settings in JSON types; those added since 0.1 only if they are set."""
    neutral = asdict(Sampling())
    values = {k: v for k, v in asdict(sampling).items() if k in _ALWAYS or v != neutral[k]}
    in_json: dict[str, Any] = json.loads(json.dumps(values))
    return in_json


def manifest_path(output: Path) -> Path:
    """Path of an output's manifest."""
    return output.with_name(f"{output.name}.manifest.json")


def load_manifest(output: Path) -> Manifest:
    """Read the manifest of an output.

    Raises:
        ResumeError: it is missing or unreadable.
    """
    path = manifest_path(output)
    try:
        values = parse_json(path.read_bytes())
        values["statistics"] = values.pop("report")
        manifest = TypeAdapter(Manifest).validate_python(values)
        _ = manifest.digests  # they must be readable
        return manifest
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as exc:
        raise ResumeError(
            f"{output} exists, but its manifest {path.name} cannot be read; "
            "choose another --output, or start over with --overwrite"
        ) from exc


def save_manifest(manifest: Manifest, output: Path) -> None:
    """Write the manifest of an output atomically and durably.

    Raises:
        RunError: it cannot be written.
    """
    values = asdict(manifest)
    values["report"] = values.pop("statistics")
    for name in ("files", "table_sha256"):
        if values[name] is None:
            del values[name]
    text = json.dumps(values, ensure_ascii=False, indent=2)
    with replacing(manifest_path(output)) as file:
        file.write(f"{text}\n".encode(errors="backslashreplace"))  # paths may not be UTF-8


def _common(old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that both backends report; some servers and versions report fewer."""
    names = old.keys() & new.keys()
    return {name: old[name] for name in names}, {name: new[name] for name in names}


def _differences(old: dict[str, Any], new: dict[str, Any], owner: str) -> list[str]:
    return [
        f"{owner if key == 'system_prompt' else ''}{key} {_change(old.get(key), new.get(key))}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def _change(old: object, new: object) -> str:
    """How a value changed, with long values cut to where they differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    num_same = sum(1 for _ in pairs)
    start = max(num_same - _SHOWN_BEFORE, 0) if num_same > _MAX_SHOWN // 2 else 0
    stop = start + _MAX_SHOWN
    was, now = (
        f"{'...' if start else ''}{text[start:stop]}{'...' if len(text) > stop else ''}"
        for text in texts
    )
    return f"was {was}, is {now}"
