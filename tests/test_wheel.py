"""The wheel: its kernels and platform tag, reproducible builds, and use without a C compiler."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from smolcli.engine.native.library import CPU_LIBRARY, FOLDER, library_path, system_name
from tools.build_kernels import host
from tools.check_wheel import library_problems, problems

ROOT = Path(__file__).parents[1]
SOURCES = ("smolcli", "tools", "hatch_build.py", "pyproject.toml", "README.md", "LICENSE")
SITE_PACKAGES = Path(pytest.__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(system_name() != "linux", reason="not tested elsewhere"),
]


def build_wheel(folder: Path, libraries: list[Path]) -> Path:
    """Build the wheel from a copy of the sources.

    Args:
        folder: a new directory for the copy.
        libraries: kernels that need not be compiled again.
    """
    kernels = folder / "build" / "kernels" / "host"
    kernels.mkdir(parents=True)
    for path in libraries:
        shutil.copy(path, kernels)
    skipped = shutil.ignore_patterns("__pycache__", "*.so", ".build-*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    env = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "SMOL_WHEEL_FOR_THIS_CPU": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel") / "first", [*FOLDER.glob("libsmol-*")])


def test_wheel_has_the_kernels_and_the_tag_of_its_platform(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist()}
    assert {path.name for path in FOLDER.glob("libsmol-*")} <= names
    assert not names & {"kernels.c", "team.h"}
    assert wheel.name.endswith(f"-py3-none-linux_{host().machine}.whl")
    assert problems(wheel) == []


def test_tag_that_promises_too_much_is_rejected(wheel: Path, tmp_path: Path) -> None:
    """Kernels compiled on a current system once got the tag of a glibc that is too old for them."""
    machine = host().machine
    tagged = tmp_path / wheel.name.replace("-linux_", "-manylinux_2_5_")
    shutil.copy(wheel, tagged)
    assert any("newer than manylinux_2_5" in problem for problem in problems(tagged))
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(next(n for n in archive.namelist() if "-float32" in n))
    assert list(library_problems(library, f"linux_{machine}")) == []
    assert list(library_problems(library, "linux_riscv64"))
    assert list(library_problems(library, "win_amd64")) == ["is not a library for win_amd64"]
    wrong = library + b"\0libc.so.6\0libz.so.1\0"
    assert list(library_problems(wrong, f"linux_{machine}")) == [
        "needs libz.so.1, which a system may lack"
    ]
    pure = tmp_path / "smolcli-1-py3-none-any.whl"
    shutil.copy(wheel, pure)
    assert "the tag is any, but there are native libraries" in problems(pure)


def test_two_builds_give_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    """In different directories, with a library compiled again; `make dist-check` compiles all."""
    libraries = [*(wheel.parents[1] / "build" / "kernels" / "host").glob("libsmol-*")]
    again = [path for path in libraries if path.name != library_path(CPU_LIBRARY, "linux").name]
    assert len(again) == len(libraries) - 1
    assert build_wheel(tmp_path / "second", again).read_bytes() == wheel.read_bytes()


def test_source_archive_has_all_that_the_readme_and_the_tests_use(tmp_path: Path) -> None:
    """Without constraints.txt, the Makefile and docs/, neither works there."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        *("Makefile", "constraints.txt", "Dockerfile", "deploy/compose.yaml", "mkdocs.yml"),
        *("docs/reference.md", "smolcli/engine/native/team.h", "tests/kernel_driver.c"),
    } <= names
    assert not any(name.endswith(".so") for name in names)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and the packages that smol requires from this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    installed = next((folder / "lib").glob("python*/site-packages"))
    # The path files in this directory, such as that of an editable smol, have no effect there.
    (installed / "requirements.pth").write_text(f"{SITE_PACKAGES}\n")
    return folder


@pytest.mark.model
@pytest.mark.usefixtures("model_folder")
def test_installed_wheel_runs_native_kernels_without_a_compiler(
    environment: Path, tmp_path: Path
) -> None:
    env: Mapping[str, str] = {
        **{k: v for k, v in os.environ.items() if k not in ("CC", "PYTHONPATH")},
        "PATH": str(environment / "bin"),
    }
    (tmp_path / "questions.jsonl").write_text(
        '{"chat_id": "1", "user_prompt": "What is the capital of France?", "max_new_tokens": 8}\n'
    )
    command = [str(environment / "bin" / "smol"), "run", "questions.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "questions.results.jsonl").read_text())
    assert "Paris" in answer["response"]
    manifest = json.loads((tmp_path / "questions.results.jsonl.manifest.json").read_text())
    assert manifest["backend"]["kernels"] == "native"
