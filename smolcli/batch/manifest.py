"""The record beside an output of how it came to be, and whether a run may go on with it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from smolcli.batch.input_scan import InputScan
from smolcli.data.jsonl import replacing
from smolcli.errors import ResumeRefused
from smolcli.protocol.line_formats import SMOL
from smolcli.settings import EngineSettings, RunSettings

_RECORDED_ONLY = ("versions", "threads", "device")  # of the backend: may differ after a resume


@dataclass(frozen=True, slots=True)
class Manifest:
    """What made an output: written before its first line, and again with a report at the end.

    `created` is when the answers say they were made: no clock's time but the input's, so that equal
    runs give equal bytes. `errors` is where failed lines go, if not into the output.
    `model` and `dtype` are as the command had them, `backend` is what they turned out to be;
    None where a run had nothing to ask a model.
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
    report: dict[str, Any] | None = None

    @classmethod
    def of(cls, settings: RunSettings, known: InputScan, seed: int, created: int) -> Self:
        """The manifest of a run whose backend is not known yet."""
        defaults = settings.defaults
        several = None if known.format is SMOL else defaults.several_temperature
        generation = asdict(defaults.sampling) | {
            "system_prompt": defaults.system_prompt,
            "extra_fields": defaults.extra_fields,
            "schema": defaults.format.schema if defaults.format else None,
            "several_temperature": several,
            "timings": settings.with_timings,
            "prompt": settings.rows.prompt,
            "id_column": settings.rows.id_column,
            "fields": list(settings.rows.fields) or None,
        }
        del generation["seed"]
        return cls(
            input=str(settings.input),
            input_sha256=known.sha256,
            limit=settings.limit,
            seed=seed,
            created=created,
            generation=generation,
            model=settings.engine.model,
            dtype=settings.engine.dtype,
            errors=str(settings.errors.resolve()) if settings.errors else None,
        )

    def asks_for(self, engine: EngineSettings) -> bool:
        """Whether the model was asked for in the same words."""
        return (self.model, self.dtype) == (engine.model, engine.dtype)

    def refuse_change(self, new: "Manifest", output: Path) -> None:
        """Check that a run as in `new` would go on with the same answers.

        Raises:
            ResumeRefused: naming all that differs.
        """
        old_values, new_values = self._identity(), new._identity()
        changes = [
            f"{key} was {_shown(old_values.get(key))}, is {_shown(new_values.get(key))}"
            for key in sorted(old_values | new_values)
            if old_values.get(key) != new_values.get(key)
        ]
        if changes:
            raise ResumeRefused(
                f"{output} was made by a run with other settings: {'; '.join(changes)}; "
                "give another --output, or --overwrite to start anew"
            )

    def version_changes(self, new: "Manifest") -> str:
        """Which versions are not the same any more, "" if all are; they forbid nothing."""
        old_versions = (self.backend or {}).get("versions", {})
        new_versions = (new.backend or {}).get("versions", {})
        return ", ".join(
            f"{name} {old_versions.get(name)} -> {version}"
            for name, version in sorted(new_versions.items())
            if old_versions.get(name) != version
        )

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the answers."""
        backend = {k: v for k, v in (self.backend or {}).items() if k not in _RECORDED_ONLY}
        return {"input_sha256": self.input_sha256, "seed": self.seed} | self.generation | backend


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies."""
    return output.with_name(f"{output.name}.manifest.json")


def load_manifest(output: Path) -> Manifest:
    """Read the manifest of an output.

    Raises:
        ResumeRefused: where there is none, or none of this version's.
    """
    path = manifest_path(output)
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as exc:
        raise ResumeRefused(
            f"{output} exists, and how it was made cannot be read from {path.name}; "
            "give another --output, or --overwrite to start anew"
        ) from exc


def save_manifest(manifest: Manifest, output: Path) -> None:
    """Write the manifest of an output, in one step that survives a power cut.

    Raises:
        RunError: where it cannot be written.
    """
    text = json.dumps(asdict(manifest), ensure_ascii=False, indent=2)
    with replacing(manifest_path(output)) as file:
        file.write(f"{text}\n".encode())


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
