"""`smol doctor` and `smol models`: installed models, damage and remedies."""

import json
import re
from pathlib import Path

import pytest
from model_stores import MODEL, entries, fill_store
from test_cli import smol

from smolcli.backends.ray.worker import store_sent_model
from smolcli.cli.doctor import required_packages
from smolcli.weights.store import ModelFiles

pytestmark = pytest.mark.usefixtures("home")


def doctor(*args: object) -> tuple[int, dict[str, dict[str, str]]]:
    """Run `smol doctor`; returns the exit code and the findings by name."""
    done = smol("doctor", "--json", *args)
    found = json.loads(done.stdout)
    assert found["ok"] is (done.exit_code == 0)
    for check in found["checks"]:
        assert (check["status"] == "ok") is (check["remedy"] is None)
    return done.exit_code, {check["name"]: check for check in found["checks"]}


def install(tiny_folder: Path, home: Path) -> Path:
    """Receive the tiny model from the store of another machine; returns its folder."""
    contents = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    contents["smol.json"] = b"{}"
    store_sent_model(ModelFiles(MODEL, tiny_folder, "abc", "test"), contents)
    return home / "models" / "shipped--abc"


def test_everything_is_ok_with_a_model(tiny_folder: Path) -> None:
    code, found = doctor("--model", tiny_folder, "--dtype", "float32", "--max-batch-size", 5)
    assert code == 0
    assert {"python", "packages", "torch", "machine", "gpu", "disk", "model", "memory"} <= set(
        found
    )
    assert found["resolved"]["detail"].startswith("float32 on cpu")
    assert "batch size: 5," in found["resolved"]["detail"]
    assert re.search(r"variant (x86-64|aarch64)|^torch: ", found["kernels"]["detail"])
    assert found["hub"]["status"] == "note"


def test_missing_model_without_a_hub_is_fatal(home: Path) -> None:
    code, found = doctor()
    assert code == 1
    assert (found["model"]["status"], found["model"]["remedy"]) == ("bad", "smol pull")
    assert doctor("--model", home / "nowhere")[0] == 1


def test_damaged_model_is_detected(home: Path, tiny_folder: Path) -> None:
    """The recorded digest reveals a flipped bit, the header a truncated file."""
    weights = install(tiny_folder, home) / "model.safetensors"
    name, whole = "shipped--abc", weights.read_bytes()
    assert doctor("--model", name)[0] == 0
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, found = doctor("--model", name)
    assert code == 1
    assert "model.safetensors has changed since it was installed" in found["model"]["detail"]
    assert found["model"]["remedy"] == f"smol models rm {name}; smol pull {name}"
    short = fill_store(home, tiny_folder) / "model.safetensors"
    short.write_bytes(whole[:-100])
    assert "model.safetensors is damaged" in doctor("--model", MODEL)[1]["model"]["detail"]


def test_missing_device_is_fatal(tiny_folder: Path) -> None:
    code, found = doctor("--model", tiny_folder, "--device", "cuda:99")
    assert code == 1
    assert found["resolved"]["status"] == "bad"


def test_remedy_for_packages_installs_only_what_is_missing() -> None:
    """The remedy was a command for a source checkout, which a container image does not have."""
    found = required_packages(
        ["pytest<1", "numpy", "torch>=2", "no-such-package>=1,<2", "nor-this; python_version < '3'"]
    )
    assert found.status == "bad"
    assert "no-such-package is not installed" in found.detail
    assert "does not satisfy <1" in found.detail
    assert found.remedy == "pip install 'pytest<1' 'no-such-package<2,>=1'"
    assert required_packages(["pytest", "numpy"]).status == "ok"


def test_text_output_includes_remedies(tiny_folder: Path) -> None:
    done = smol("doctor", "--model", tiny_folder)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok   python")
    hub = next(index for index, line in enumerate(lines) if line.startswith("note hub"))
    assert lines[hub + 1].lstrip().startswith("-> only needed to download")


def test_models_are_listed_shown_and_removed(home: Path, tiny_folder: Path) -> None:
    done = smol("models", "list")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "model store is empty" in done.stderr
    folder = fill_store(home, tiny_folder)
    (fill_store(home, tiny_folder, "some/other") / "config.json").unlink()
    lines = smol("models", "list").stdout.splitlines()
    assert lines[0].split() == ["some/other", "1", "MB", "damaged", "float32"]
    assert lines[1].split() == [MODEL, "1", "MB", "pypi", "abc", "float32"]
    listed = json.loads(smol("models", "list", "--json").stdout)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert listed[1] == {
        "name": MODEL,
        "bytes": size,
        "format": "float32",
        "source": "pypi",
        "revision": "abc",
    }
    shown = json.loads(smol("models", "show", MODEL).stdout)
    assert (shown["source"], shown["damage"]) == ("pypi", None)
    damaged = smol("models", "show", "some/other")
    assert damaged.exit_code == 1
    assert json.loads(damaged.stdout)["damage"] == "config.json is missing"
    assert smol("models", "rm", MODEL, "some/other").exit_code == 0
    assert entries(home) == []


def test_store_that_cannot_be_read_is_named(home: Path) -> None:
    """It gave a traceback in the home directory of another user, as in some containers."""
    home.mkdir()
    (home / "models").touch()
    done = smol("models", "list")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"cannot read the model store {home / 'models'}: " in done.stderr
    code, found = doctor()
    assert (code, found["disk"]["status"]) == (1, "bad")
    variables = {"_SMOL_COMPLETE": "complete_bash", "COMP_WORDS": "smol run --model t"}
    done = smol(env=variables | {"COMP_CWORD": "3"}, prog_name="smol")
    assert (done.exit_code, done.stdout.strip()) == (0, "")


def test_unknown_model_name_lists_the_models_in_the_store(home: Path, tiny_folder: Path) -> None:
    fill_store(home, tiny_folder)
    for command in ("show", "rm"):
        done = smol("models", command, "tests/tny")
        assert done.exit_code == 1
        assert done.stderr == (
            f"smol: the store has no model 'tests/tny'; models in the store: {MODEL}\n"
        )
    assert len(entries(home)) == 1


@pytest.mark.parametrize(
    ("typed", "index", "completed"),
    [
        ("smol run --model te", 3, [MODEL]),
        ("smol models rm ", 3, [MODEL]),
        ("smol doc", 1, ["doctor"]),
        ("smol ask --max-n", 2, ["--max-new-tokens"]),
    ],
)
def test_shell_completes_models_commands_and_options(
    home: Path, tiny_folder: Path, typed: str, index: int, completed: list[str]
) -> None:
    fill_store(home, tiny_folder)
    variables = {"_SMOL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(index)}
    done = smol(env=variables, prog_name="smol")
    assert done.stdout.splitlines() == completed
