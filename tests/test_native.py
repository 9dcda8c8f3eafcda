"""Kernels compiled here: when there are none, where they are kept, and what they compute."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_tools import native_kernels
from safetensors.torch import load_file
from typer.testing import CliRunner

from smolcli.cli.main import app
from smolcli.engine.autoconfig import resolve_config
from smolcli.engine.interfaces import Model
from smolcli.engine.native import build
from smolcli.engine.native.bindings import Kernels
from smolcli.engine.native.build import load_kernels
from smolcli.engine.native.model import NativeModel, interleaved, pack
from smolcli.engine.sequence import ScheduledSequence, Sequence
from smolcli.engine.torch_ops.model import TorchHead, TorchModel
from smolcli.settings import EngineSettings
from smolcli.weights.loader import load_config, load_model

FLOAT = EngineSettings(dtype="float32")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return native_kernels("float32")


@pytest.fixture
def fresh(kernels: Kernels) -> Iterator[None]:
    """Nothing is loaded yet, and afterwards nothing that the test loaded."""
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


@pytest.mark.usefixtures("fresh", "home")
def test_without_a_compiler_torch_computes(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    config = resolve_config(FLOAT, load_config(tiny_folder))
    assert (config.kernels, config.unsupported_reason) == (None, "there is no C compiler")


@pytest.mark.usefixtures("fresh", "home")
def test_the_doctor_says_what_is_slow(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = CliRunner().invoke(app, ["doctor", "--model", str(tiny_folder), "--dtype", "float32"])
    assert "kernels: torch (there is no C compiler)" in " ".join(done.output.split())
    assert "they need a C compiler" in " ".join(done.output.split())


@pytest.mark.skipif(sys.platform == "win32", reason="a script for a shell")
@pytest.mark.usefixtures("fresh", "home")
def test_a_compiler_that_fails_is_quoted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'kernels.c:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = resolve_config(FLOAT, load_config(tiny_folder))
    assert config.kernels is None
    assert config.unsupported_reason == f"{compiler}: kernels.c:1: error: no such thing"


@pytest.mark.usefixtures("fresh")
def test_a_library_is_compiled_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_kernels("float32")
    [kept] = (home / "kernels").iterdir()
    load_kernels.cache_clear()
    monkeypatch.setenv("PATH", "")
    load_kernels("float32")
    assert [*(home / "kernels").iterdir()] == [kept]


@pytest.mark.usefixtures("fresh")
def test_a_home_that_cannot_be_written_to_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMOL_HOME", str(tmp_path / "file" / "home"))
    assert load_kernels("float32").dtype is torch.float32


@pytest.mark.usefixtures("fresh", "home")
def test_where_no_library_may_be_run_torch_computes(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on disks that are mounted noexec."""

    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(build, "CDLL", refuse)
    config = resolve_config(FLOAT, load_config(tiny_folder))
    assert config.kernels is None
    assert "failed to map segment" in config.unsupported_reason


def test_a_shape_that_does_not_fit_is_left_to_torch(
    kernels: Kernels, tiny_folder: Path, tmp_path: Path
) -> None:
    text = (tiny_folder / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(text.replace('"head_dim": 32', '"head_dim": 36'))
    config = resolve_config(FLOAT, load_config(tmp_path))
    assert config.kernels is None
    assert config.unsupported_reason == f"head_dim 36 is no multiple of {2 * kernels.width}"


def test_packing_keeps_every_weight(kernels: Kernels) -> None:
    weight = torch.arange(70 * 6, dtype=torch.float32).view(70, 6)
    packed = pack(weight, kernels)
    panels = -(-70 // kernels.panel)
    assert packed.shape == (panels, 6, kernels.panel, 1)
    unpacked = packed.permute(0, 2, 1, 3).reshape(-1, 6)
    assert torch.equal(unpacked[:70], weight)
    assert not unpacked[70:].any()


def test_rows_of_gate_and_up_take_turns() -> None:
    gate = torch.arange(8.0).view(4, 2)
    rows = interleaved(gate, -gate, 2)
    assert rows[:, 0].tolist() == [0, 2, 0, -2, 4, 6, -4, -6]


def test_activations_of_any_size_are_computed(kernels: Kernels, tiny_folder: Path) -> None:
    """The exponential inside of SiLU once overflowed into nonsense below -88."""
    config, weights = load_config(tiny_folder), load_file(tiny_folder / "model.safetensors")
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    large = {n: w * 1000 if "gate_proj" in n else w for n, w in weights.items()}
    ours = NativeModel(config, large, kernels)
    theirs = TorchModel(config, large, torch.float32, torch.device("cpu"))
    seen = [hidden_states(model, list(range(5, 45))) for model in (ours, theirs)]
    assert torch.allclose(*seen, rtol=1e-3, atol=1e-3 * seen[1].abs().max().item())


def hidden_states(model: Model, token_ids: list[int]) -> torch.Tensor:
    """After the last token."""
    cache, sequence = model.make_kv_cache(0), Sequence(token_ids)
    cache.allocate(sequence)
    cache.ensure_capacity(sequence)
    return model.forward(cache.make_batch([ScheduledSequence(sequence, 0, len(token_ids))]))


def test_heads_agree(kernels: Kernels, tiny_folder: Path) -> None:
    """Scores of the whole vocabulary, and the best of them, are those that torch computes."""
    ours = load_model(tiny_folder, "float32", "cpu", kernels)
    assert isinstance(ours, NativeModel)
    theirs = load_model(tiny_folder, "float32").head
    assert isinstance(theirs, TorchHead)
    hidden = torch.randn(37, ours.config.hidden_size, generator=torch.Generator().manual_seed(1))
    logits = torch.as_tensor(ours.head.logits(hidden))
    assert torch.allclose(logits, torch.as_tensor(theirs.logits(hidden)), atol=1e-4)
    best = ours.head.best(hidden)
    assert best == theirs.best(hidden) == logits.argmax(-1).tolist()
    masks = [None if n % 3 == 0 else random.Random(n).randbytes(48) for n in range(37)]
    allowed = ours.head.best(hidden, masks)
    assert allowed == theirs.best(hidden, masks)
    assert allowed[::3] == best[::3]
    assert allowed != best


def test_what_is_not_a_number_is_told(kernels: Kernels, tiny_folder: Path) -> None:
    model = load_model(tiny_folder, "float32", "cpu", kernels)
    hidden = torch.ones(3, model.config.hidden_size)
    hidden[1] = torch.nan
    with pytest.raises(FloatingPointError):
        model.head.best(hidden)
