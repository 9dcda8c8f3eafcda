"""`smol bench`: measurements of real work, as a table, JSON and a plot."""

import json
from pathlib import Path

import pytest
from fakes import EchoBackend
from typer.testing import CliRunner

from smolcli.bench.measure import Reading, medians, time_backend
from smolcli.bench.workload import long_prompt, reference, stories
from smolcli.cli.main import app
from smolcli.errors import RunError
from smolcli.settings import BenchPlan
from smolcli.types import ErrorCode, Query, Result, failure

SMALL = (
    "--dtype",
    "float32",
    "--threads",
    "1",
    "--prompts",
    "16",
    "--sizes",
    "1,3",
    "--questions",
    "2",
    "--runs",
    "1",
)


def test_smol_and_transformers_are_measured_on_the_same_work(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Both systems do all of the work, and the table, the JSON and the plot agree."""
    out, picture, peers = tmp_path / "b.json", tmp_path / "b.svg", tmp_path / "peers"
    peers.write_text('{"system": "other", "tokens": 100, "tokens_per_second": 50.0}\n')
    files = ("--json", out, "--plot", picture, "--peers", peers)
    args = ("bench", "--model", tiny_folder, *SMALL, "--compare", "transformers", *files)
    done = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "vs. transformers" in done.stdout
    assert "float32" in done.stdout
    record = json.loads(out.read_text())
    works = [(r["system"], r["work"], r["size"]) for r in record["medians"]]
    own = [("prompt", 16), ("batch", 1), ("batch", 3), ("questions", 2)]
    assert works == [
        *(("smol", *work) for work in own),
        *(("transformers", *work) for work in own),
        ("other", "questions", 64),
    ]
    tokens = {(r["system"], r["work"], r["size"]): r["tokens"] for r in record["medians"]}
    assert tokens["smol", "batch", 3] == tokens["transformers", "batch", 3]
    assert tokens["smol", "questions", 2] == tokens["transformers", "questions", 2]
    assert record["backend"]["dtype"] == "float32"
    assert "<svg" in picture.read_text()


def test_medians_keep_the_order_of_the_work() -> None:
    slow, middle, fast = (Reading("a", "batch", 8, 100, s) for s in (4.0, 2.0, 1.0))
    other = Reading("b", "batch", 8, 100, 3.0)
    assert medians([slow, other, fast, middle]) == [middle, other]


def test_no_prompt_or_answer_is_reused() -> None:
    queries = [*reference(), *stories(128), *(long_prompt(64, turn) for turn in range(9))]
    prompts = [query.messages[-1].content for query in queries]
    assert len(set(prompts)) == len(prompts)
    assert len({prompt[:2] for prompt in prompts[-9:]}) == 9


def test_a_failed_query_ends_the_benchmark() -> None:
    class Failing(EchoBackend):
        def answer(self, query: Query) -> Result:
            return failure(query, "no luck", ErrorCode.INTERNAL)

    with pytest.raises(RunError, match="failed: no luck"):
        time_backend(Failing(), BenchPlan(), 0, "smol", print)


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (("--sizes", "1,x"), 2, "--sizes must be a comma-separated list"),
        (("--prompts", "0"), 2, "--prompts must be a comma-separated list"),
        (("--peers", "nothing"), 1, "cannot read --peers nothing: No such file or directory"),
        (("--peers", __file__), 1, "does not contain the output of benchmarks/peer_*.py"),
        (("--json", "missing/b.json"), 2, "cannot write missing/b.json: it is a directory, or"),
        (("--plot", "."), 2, "cannot write .: it is a directory, or"),
        (("--plot", "b.txt"), 2, "--plot b.txt: unknown format; use a .svg or .png file"),
        (("--json", "b.svg", "--plot", "b.svg"), 2, "--json and --plot name the same file"),
    ],
)
def test_invalid_options_are_usage_errors(args: tuple[str, ...], code: int, sentence: str) -> None:
    """Before anything is measured: files that could not be written cost all measurements."""
    done = CliRunner().invoke(app, ["bench", *args], obj=EchoBackend)
    assert (done.exit_code, sentence in done.stderr) == (code, True), done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("length", [500, 512, 10**9])
def test_prompts_must_fit_the_context(length: int, tiny_folder: Path) -> None:
    """A prompt of 99,999,999 words was built and tokenized until the process was killed."""
    args = ("bench", "--model", str(tiny_folder), "--prompts", f"16,{length}")
    done = CliRunner().invoke(app, args)
    said = f"smol: a prompt of {length} words does not fit the model's context of 512 tokens; "
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"{said}pass shorter --prompts\n"
