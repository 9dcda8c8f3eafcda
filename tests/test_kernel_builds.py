"""The kernels built for other CPUs: aarch64 under qemu, wide vectors emulated, sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tools.build_kernels import FLAGS

DRIVER = Path(__file__).with_name("kernel_driver.c")
TEAM = Path(__file__).parents[1] / "smolcli" / "engine" / "native" / "team.c"
AVX2 = ("-march=x86-64-v3", "-DEMULATE_VNNI")
INSTRUCTIONS = ("1", "2")  # of integer products; see int8_products.h

is_x86 = os.uname().machine == "x86_64" if hasattr(os, "uname") else False
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_x86, reason="compares other builds with x86-64"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]


def build(path: Path, *flags: str, compiler: str = "gcc", bf16: tuple[int, int] = (0, 0)) -> Path:
    """The driver with the kernels in one format: bfloat16 weights, bfloat16 products."""
    formats = [f"-DBF16_WEIGHTS={bf16[0]}", f"-DBF16_PRODUCTS={bf16[1]}", '-DSOURCE_HASH="test"']
    shared = [flag for flag in FLAGS if flag != "-O3"]  # takes four times as long
    command = [compiler, *shared, "-Og", *formats, *flags, str(DRIVER), str(TEAM)]
    subprocess.run([*command, "-o", str(path), "-pthread", "-lm"], check=True, capture_output=True)
    return path


INTEGER = ("1", "2", "3")  # Q4_0, Q4_1, Q8_0, as numbered in kernels.c
QUANTIZED = (*INTEGER, "4", "5", "6")  # also Q4_K, Q5_K, Q6_K


def output(*command: str | Path) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """A row for each sequence: its next token and its hidden states."""
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    return np.array([line.split() for line in done.stdout.splitlines()], float)


def relative_error(
    found: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    expected: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
) -> float:
    """The largest error of a sequence's hidden states, relative to their norm."""
    errors = np.linalg.norm(found[:, 1:] - expected[:, 1:], axis=1)
    return float((errors / np.linalg.norm(expected[:, 1:], axis=1)).max())


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver") / "driver", *AVX2)


@pytest.fixture(scope="module")
def expected(driver: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    return output(driver, "2")


def test_quantized_matrices_give_the_bits_of_expanded_ones(
    driver: Path, expected: "np.ndarray[tuple[int, int], np.dtype[np.float64]]"
) -> None:
    for stored in QUANTIZED:
        assert np.array_equal(output(driver, "1", stored), expected), stored


def test_integer_products_have_the_same_bits_in_all_instructions(
    driver: Path, expected: "np.ndarray[tuple[int, int], np.dtype[np.float64]]"
) -> None:
    """AVX2's pairs of products and VNNI's dot products, which are emulated."""
    for stored in INTEGER:
        found = output(driver, "2", stored, "1")
        assert np.array_equal(output(driver, "1", stored, "2"), found), stored
        assert 0 < relative_error(found, expected) < 0.03, stored


@pytest.mark.parametrize("bf16", [(0, 0), (1, 0), (1, 1)])
def test_aarch64_equals_x86(
    driver: Path,
    expected: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    bf16: tuple[int, int],
    tmp_path: Path,
) -> None:
    """Bit for bit with float32 arithmetic, also of integers; closely with bfloat16 products.

    In all formats, quantized matrices give the same bits as expanded ones, and integer products
    with and without the dot product extension.
    """
    compiler, qemu = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not (compiler and qemu):
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
    march = "-march=armv8.2-a+bf16" if bf16[1] else "-march=armv8-a"
    path = build(tmp_path / "driver", march, "-static", compiler=compiler, bf16=bf16)
    found = output(qemu, path, "2")
    for stored in QUANTIZED:
        assert np.array_equal(output(qemu, path, "2", stored), found), stored
    for stored in INTEGER:
        rounded, by_dot = (output(qemu, path, "2", stored, kind) for kind in INSTRUCTIONS)
        assert np.array_equal(rounded, by_dot), stored
        if bf16 == (0, 0):
            assert np.array_equal(rounded, output(driver, "2", stored, "1")), stored
    if bf16[1]:
        assert relative_error(found, expected) < 0.03
    else:
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(("bf16", "tolerance"), [((0, 0), 1e-5), ((1, 0), 1e-5), ((1, 1), 0.03)])
def test_wide_vectors_agree_with_narrow_ones(
    expected: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    bf16: tuple[int, int],
    tolerance: float,
    tmp_path: Path,
) -> None:
    """The AVX-512 code, its vectors emulated by two of AVX2 and its bfloat16 products in C."""
    flags = (*AVX2, "-DWIDTH=16", *(["-DEMULATE_BF16"] if bf16[1] else []))
    path = build(tmp_path / "driver", *flags, bf16=bf16)
    found = output(path, "2")
    for stored in QUANTIZED:
        assert np.array_equal(output(path, "2", stored), found), stored
    for stored in INTEGER:
        rounded, by_dot = (output(path, "2", stored, kind) for kind in INSTRUCTIONS)
        assert np.array_equal(rounded, by_dot), stored
        assert 0 < relative_error(rounded, expected) < 0.04, stored
    assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("seed", [1, 2])
def test_any_team_gives_the_same_bits(seed: int, driver: Path) -> None:
    """Teams of 1, 2, 3 and 5 threads that come and go beside threads that take their cores.

    Seed 1 computes in float32, seed 2 in integers.
    """
    done = subprocess.run([driver, "stress", "60", str(seed)], capture_output=True, text=True)
    assert done.stdout == f"seed {seed}: 60 steps, 0 wrong\n"
