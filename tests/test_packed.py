"""Packed weights: written once, shared, and rebuilt when they are damaged or out of date."""

import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_stores import MODEL, fill_store
from typer.testing import CliRunner

from smolcli.backends.local import LocalBackend
from smolcli.cli.main import app
from smolcli.engine.engine import Engine
from smolcli.engine.native.bindings import Array, KernelError, Kernels, load_kernels
from smolcli.engine.native.model import NativeModel
from smolcli.engine.native.packing import pack_into, packed_layout
from smolcli.engine.prefix_cache import BLOCK_TOKENS
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message, Query, Sampling
from smolcli.weights import packed
from smolcli.weights.checkpoint import load_weights
from smolcli.weights.loader import load_config
from smolcli.weights.packed import packed_files, packed_weights, remove_packed
from smolcli.weights.store import ModelFiles, stored
from smolcli.weights.stored_prefix import StoredPrefix

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def kernels() -> Kernels:
    try:
        return copy(load_kernels("float32"))
    except KernelError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def files(tiny_folder: Path) -> ModelFiles:
    return ModelFiles("tests/tiny", tiny_folder, "abc", "folder")


@pytest.fixture
def num_packed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts how often weights are packed."""
    calls = []

    def counting(*args: Any) -> None:
        calls.append(1)
        pack_into(*args)

    monkeypatch.setattr(packed, "pack_into", counting)
    return lambda: len(calls)


def expected(files: ModelFiles, kernels: Kernels) -> bytes:
    config = load_config(files.folder)
    buffer = np.empty(packed_layout(config, kernels).num_bytes, np.uint8)
    pack_into(buffer, config, load_weights(files.folder, config), kernels)
    return buffer.tobytes()


def pack(files: ModelFiles, kernels: Kernels) -> "np.ndarray[Any, Any]":
    found = packed_weights(files, load_config(files.folder), kernels, {}, min_bytes=0)
    assert found is not None
    return found


def test_weights_are_packed_once(
    files: ModelFiles, kernels: Kernels, num_packed: Callable[[], int]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: pack(files, kernels), range(4)))
    assert num_packed() == 1
    assert {result.tobytes() for result in results} == {expected(files, kernels)}
    assert not results[0].flags.writeable
    (file,) = packed_files()
    assert (file.model, file.kernels) == ("tests/tiny", kernels.name)
    assert file.num_bytes == len(results[0])


@pytest.mark.parametrize("damage", ["flip", "truncate", "no record", "bad record", "touch"])
def test_damaged_file_is_rebuilt(
    files: ModelFiles, kernels: Kernels, num_packed: Callable[[], int], damage: str
) -> None:
    pack(files, kernels)
    (file,) = packed_files()
    content = bytearray(file.path.read_bytes())
    if damage == "flip":
        content[1000] ^= 1
        file.path.write_bytes(content)
    elif damage == "truncate":
        file.path.write_bytes(content[:-1])
    elif damage == "no record":
        file.path.with_suffix(".json").unlink()
    elif damage == "bad record":
        file.path.with_suffix(".json").write_text("[")
    later_ns = file.path.stat().st_mtime_ns + 10**9  # file systems have coarse clocks
    os.utime(file.path, ns=(later_ns, later_ns))
    assert pack(files, kernels).tobytes() == expected(files, kernels)
    assert num_packed() == (1 if damage == "touch" else 2)
    (file,) = packed_files()
    record = json.loads(file.path.with_suffix(".json").read_text("utf-8"))
    assert record["modified_ns"] == file.path.stat().st_mtime_ns


def test_file_in_a_layer_of_a_container_image_is_used(
    files: ModelFiles, kernels: Kernels, num_packed: Callable[[], int]
) -> None:
    """Layers keep modification times in whole seconds; weights were once packed at every start."""
    pack(files, kernels)
    (file,) = packed_files()
    for path in (file.path, *files.folder.iterdir()):
        time_ns = path.stat().st_mtime_ns // 10**9 * 10**9
        os.utime(path, ns=(time_ns, time_ns))
    record = file.path.with_suffix(".json").read_text()
    pack(files, kernels)
    assert num_packed() == 1
    assert file.path.with_suffix(".json").read_text() == record, "the file was read and hashed"


def test_another_revision_or_config_replaces_the_file(
    files: ModelFiles, kernels: Kernels, num_packed: Callable[[], int]
) -> None:
    pack(files, kernels)
    pack(replace(files, revision="def"), kernels)
    config = replace(load_config(files.folder), rope_theta=5.0)
    packed_weights(files, config, kernels, {}, min_bytes=0)
    assert num_packed() == 3
    (file,) = packed_files()
    remove_packed(file)
    assert list(packed.packed_folder().iterdir()) == []


def test_unwritable_store_packs_in_memory(
    files: ModelFiles, kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMOL_HOME", str(tmp_path / "file"))
    assert packed_weights(files, load_config(files.folder), kernels, {}, min_bytes=0) is None


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_disk_space_is_reserved_before_packing(
    files: ModelFiles, kernels: Kernels, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk once ended the process with SIGBUS, because packing writes to mapped memory."""
    reserved = []

    def recording(built: Array, *args: Any) -> None:
        (path,) = home.glob("models/.packed--*.partial/packed")
        reserved.append(path.stat().st_blocks * 512 >= built.nbytes)
        pack_into(built, *args)

    monkeypatch.setattr(packed, "pack_into", recording)
    pack(files, kernels)
    assert reserved == [True]


def test_packed_weights_are_listed_shown_and_removed(
    tiny_folder: Path, home: Path, kernels: Kernels
) -> None:
    fill_store(home, tiny_folder)
    found = stored(MODEL)
    assert found is not None
    pack(found, kernels)
    pack(ModelFiles("/only/packed", tiny_folder, "def", "folder"), kernels)
    (file,) = [file for file in packed_files() if file.model == MODEL]

    listed = json.loads(run_models("list", "--json"))
    assert [(each["name"], each["source"], each["format"]) for each in listed] == [
        (MODEL, "pypi", "float32"),
        ("/only/packed", "packed", kernels.name),
        (MODEL, "packed", kernels.name),
    ]
    assert f"packed                {kernels.name}" in run_models("list")
    assert json.loads(run_models("show", MODEL))["packed"] == {kernels.name: file.num_bytes}
    run_models("rm", home.joinpath("models").glob("[!.]*").__next__().name, "/only/packed")
    assert list(packed_files()) == []
    assert stored(MODEL) is None


def test_the_shared_prefix_of_prompts_is_computed_once(files: ModelFiles, kernels: Kernels) -> None:
    """The next process finds its keys and values in the prefix cache, and answers with equal bits.

    Damaged ones, and those of another build or with other blocks, are computed anew.
    """
    config = load_config(files.folder)
    weights = pack(files, kernels)
    query = Query("q", (Message("user", "Why?"),), Sampling(4), top_logprobs=2)

    def answer() -> tuple[list[object], int, bool]:
        stored_prefix = StoredPrefix(files, config, kernels)
        backend = LocalBackend(
            lambda: ChatTokenizer.load(files.folder),
            lambda: Engine(NativeModel.from_packed(config, weights, kernels), 1, 1 << 20, 1 << 20),
            {},
            1,
            stored_prefix,
        )
        with closing(backend):
            result = backend.submit(query).result()
            num_cached = backend.counters().cached_tokens
        return [result.response, result.logprobs], num_cached, stored_prefix.is_restored

    first, num_cached, is_restored = answer()
    assert (num_cached, is_restored) == (0, False)
    shared = ChatTokenizer.load(files.folder).shared_prefix()
    whole_blocks = len(shared) // BLOCK_TOKENS * BLOCK_TOKENS
    assert whole_blocks > 0
    assert answer() == (first, whole_blocks, True)

    (path,) = packed.packed_folder().glob("*.kv")
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert answer() == (first, 0, False)
    assert path.read_bytes() == intact
    body = intact[4:].replace(b'"block_tokens": 2', b'"block_tokens": 4')
    path.write_bytes(zlib.crc32(body).to_bytes(4, "little") + body)
    assert answer() == (first, 0, False)
    assert path.read_bytes() == intact
    kernels.source += "-2"
    assert answer() == (first, 0, False)
    remove_packed(*packed_files())
    assert list(packed.packed_folder().iterdir()) == []


def run_models(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout
