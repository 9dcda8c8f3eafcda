"""Several inputs, directories and patterns with one output."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fakes import DyingBackend, EchoBackend
from run_tools import answer, no_backend, results
from typer.testing import CliRunner

from smolcli.batch.manifest import load_manifest
from smolcli.cli.main import app
from smolcli.data.inputs import expanded
from smolcli.errors import BackendError, ResumeError, UsageError
from smolcli.settings import InputFile, QueryDefaults, RowSettings, RunSettings

SMOL = '{"chat_id": "s1", "user_prompt": "a"}\n\n{"chat_id": "s2"}\n'
REQUEST = {"method": "POST", "url": "/v1/chat/completions"}
OPENAI = json.dumps(
    {"custom_id": "o1", **REQUEST, "body": {"messages": [{"role": "user", "content": "b"}]}}
)
CSV = "chat_id,user_prompt\nc1,c\ns1,again\n"
BARE = '{"prompt": "d"}\n{"prompt": "e"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file in each of four formats."""
    monkeypatch.chdir(tmp_path)
    texts = {"a.jsonl": SMOL, "b.jsonl": OPENAI, "c.csv": CSV, "d.jsonl": BARE}
    for name, text in texts.items():
        Path(name).write_text(text)
    return tmp_path


def job(names: Sequence[str] = ("a.jsonl", "b.jsonl", "c.csv", "d.jsonl")) -> RunSettings:
    files = tuple(InputFile(name, Path(name)) for name in names)
    return RunSettings(files[0].path, Path("out.jsonl"), seed=1, files=files)


def smol(*args: object) -> Any:
    return CliRunner().invoke(app, ["run", *map(str, args)], obj=EchoBackend)


def places(path: Path = Path("out.jsonl")) -> list[tuple[str, int | None]]:
    return [(record["file"], record.get("line")) for record in results(path)]


def test_results_name_file_and_line_in_the_order_given(folder: Path) -> None:
    answer(job())
    assert places() == [
        ("a.jsonl", 1),
        ("a.jsonl", 3),
        ("b.jsonl", None),  # OpenAI's format has no line numbers
        ("c.csv", 2),
        ("c.csv", 3),
        ("d.jsonl", 1),
        ("d.jsonl", 2),
    ]
    records = results(Path("out.jsonl"))
    assert records[2]["response"]["body"]["choices"][0]["message"]["content"].startswith("b (")
    assert records[4]["error_code"] == "duplicate_chat_id"  # ids are unique across files
    assert [record["chat_id"] for record in records[5:]] == ["d.jsonl:1", "d.jsonl:2"]


def test_ids_of_rows_without_one_begin_with_the_file(folder: Path) -> None:
    rows = RowSettings(prompt="{user_prompt}", id_column=None)
    Path("e.csv").write_text("user_prompt\nHi\n")
    Path("f.txt").write_text("Hello\n")
    answer(replace(job(["e.csv"]), rows=rows))
    assert results(Path("out.jsonl"))[0]["chat_id"] == "e.csv:2"
    answer(replace(job(["f.txt"]), output=Path("text.jsonl")))
    assert results(Path("text.jsonl"))[0]["chat_id"] == "f.txt:1"


@pytest.mark.parametrize("num_answers", range(5))
def test_run_over_several_inputs_resumes(folder: Path, num_answers: int) -> None:
    """Whichever file it stopped in, the output equals that of an undisturbed run."""
    whole = replace(job(), output=Path("whole.jsonl"))
    answer(whole)
    with pytest.raises(BackendError):
        answer(job(), lambda settings: DyingBackend(num_answers, window=1))
    answer(job())
    assert Path("out.jsonl").read_bytes() == whole.output.read_bytes()
    answer(job(), no_backend)


def test_failed_lines_of_several_inputs_are_split_off_and_retried(folder: Path) -> None:
    errors = replace(job(), errors=Path("failed.jsonl"))
    answer(errors)
    assert places(Path("failed.jsonl")) == [("a.jsonl", 3), ("c.csv", 3)]
    Path("a.jsonl").write_text(SMOL.replace('"s2"', '"s2", "user_prompt": "fixed"'))
    answer(replace(errors, retry_errors=True))
    assert places(Path("failed.jsonl")) == [("c.csv", 3)]
    assert ("a.jsonl", 3) in places()


def test_limit_counts_the_rows_of_all_inputs(folder: Path) -> None:
    answer(replace(job(), limit=3))
    answer(replace(job(), limit=4))
    assert len(places()) == 4
    answer(job())
    assert len(places()) == 7


def test_manifest_records_a_digest_of_each_file(folder: Path) -> None:
    answer(job())
    manifest = load_manifest(Path("out.jsonl"))
    assert list(manifest.files or {}) == ["a.jsonl", "b.jsonl", "c.csv", "d.jsonl"]
    assert manifest.input == "a.jsonl and 3 more"


def test_resume_rejects_other_inputs(folder: Path) -> None:
    answer(job(["a.jsonl", "c.csv"]))
    answer(job(["a.jsonl", "c.csv", "d.jsonl"]))  # a further one
    for names, said in (
        (["a.jsonl", "b.jsonl", "c.csv"], "input 2 was c.csv, not b.jsonl"),
        (["a.jsonl"], "input 2 was c.csv, which is missing"),
    ):
        with pytest.raises(ResumeError, match=said):
            answer(job(names), no_backend)
    with pytest.raises(ResumeError, match="was made from 3 inputs"):
        answer(replace(job(["a.jsonl"]), files=()), no_backend)


def test_resume_names_the_file_that_changed(folder: Path) -> None:
    answer(job())
    Path("c.csv").write_text(CSV.replace("c1,c", "c1,x"))
    with pytest.raises(ResumeError, match=r"changed at line 2 of c\.csv"):
        answer(job(), no_backend)
    Path("c.csv").write_text(CSV)
    Path("a.jsonl").write_text(SMOL + '{"chat_id": "new", "user_prompt": "x"}\n')
    with pytest.raises(ResumeError, match=r"or lines were inserted into a\.jsonl and 3"):
        answer(job(), no_backend)


def test_check_names_file_and_line(folder: Path) -> None:
    done = smol("a.jsonl", "c.csv", "--check")
    assert done.exit_code == 3
    assert done.stdout.splitlines() == [
        "line 3 of a.jsonl: missing_field: user_prompt is required and cannot be empty",
        "line 3 of c.csv: duplicate_chat_id: chat_id 's1' was already used on an earlier line",
    ]


def test_table_of_several_inputs_has_a_file_column(folder: Path) -> None:
    assert smol("a.jsonl", "c.csv", "-o", "out.csv").exit_code == 3
    header, first, *_ = Path("out.csv").read_text().splitlines()
    assert header.endswith("field,file,line")
    assert first.endswith("a.jsonl,1")
    assert smol("a.jsonl", "-o", "one.csv").exit_code == 3
    assert "file" not in Path("one.csv").read_text().splitlines()[0]


def test_report_names_the_file(folder: Path) -> None:
    assert smol("a.jsonl", "c.csv", "-o", "out.jsonl").exit_code == 3
    assert CliRunner().invoke(app, ["report", "out.jsonl"]).exit_code == 0
    assert "line 3 of a.jsonl" in Path("out.report.html").read_text()


def test_directories_and_patterns_are_expanded(folder: Path) -> None:
    for name in (
        "data/2.jsonl",
        "data/1.csv",
        "data/.hidden.jsonl",
        "data/README.txt",
        "data/x/3.csv",
    ):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("data/old.jsonl").touch()
    Path("data/old.jsonl.manifest.json").touch()
    assert expanded(["data"], []) == ["data/1.csv", "data/2.jsonl"]
    assert expanded(["data"], [Path("data/2.jsonl")]) == ["data/1.csv"]
    assert expanded(["b.jsonl", "*.jsonl", "./b.jsonl"], []) == ["b.jsonl", "a.jsonl", "d.jsonl"]
    assert expanded(["data/**/*.csv"], []) == ["data/1.csv", "data/x/3.csv"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a.jsonl", "b.jsonl"], "several inputs need --output"),
        (["*.jsonl"], "several inputs need --output"),
        (["*.tsv", "-o", "out.jsonl"], "no file matches '*.tsv'"),
        (["empty", "-o", "out.jsonl"], "no data file in empty"),
        (
            ["nested", "-o", "out.jsonl"],
            "for files in subdirectories, pass a pattern such as 'nested/",
        ),
        (["a.jsonl", "-", "-o", "out.jsonl"], "stdin cannot be combined"),
        (["a.jsonl", "b.jsonl", "-o", "b.jsonl"], "b.jsonl is the input"),
        (["a.jsonl", "missing.jsonl", "-o", "out.jsonl"], "cannot read missing.jsonl"),
    ],
)
def test_wrong_usage_of_several_inputs_is_explained(
    folder: Path, args: list[str], said: str
) -> None:
    Path("empty").mkdir()
    Path("nested/year=2024").mkdir(parents=True)
    done = smol(*args)
    assert done.exit_code in (1, 2)
    assert said in done.stderr


def test_one_output_through_hard_links_is_rejected(folder: Path) -> None:
    """As the input, and as the file of failed lines."""
    answer(replace(job(["a.jsonl"]), files=()))
    Path("linked.jsonl").hardlink_to("a.jsonl")
    with pytest.raises(UsageError, match="is the input"):
        answer(replace(job(["a.jsonl"]), files=(), output=Path("linked.jsonl")), no_backend)
    Path("failed.jsonl").hardlink_to("out.jsonl")
    with pytest.raises(UsageError, match="choose another --errors"):
        answer(replace(job(["a.jsonl"]), files=(), errors=Path("failed.jsonl")), no_backend)


def test_defaults_apply_to_every_file(folder: Path) -> None:
    answer(replace(job(), defaults=QueryDefaults(system_prompt="Be brief.")))
    usages = [
        record["usage"]["prompt_tokens"]
        for record in results(Path("out.jsonl"))
        if "usage" in record
    ]
    assert set(usages) == {2}  # messages, as the fake backend counts


def test_directories_of_a_partitioned_table_are_columns(folder: Path) -> None:
    """They used to be unknown columns, although a pattern found the files."""
    table = pyarrow.table({"year": ["2023", "2023", None], "land": ["a/b"] * 3, "text": [*"xyz"]})
    pyarrow.parquet.write_to_dataset(table, "parts", partition_cols=["year", "land"])
    Path("parts/year=2025").mkdir()
    Path("parts/year=2025/p.jsonl").write_text('{"text": "t", "land": "own"}\n')
    pattern = "parts/**/*.*"
    smol(pattern, "--prompt", "{text}, {land}", "--fields", "year", "-o", "out.jsonl")
    answers = results(Path("out.jsonl"))
    assert [(a["response"].partition(" (")[0], a["metadata"]["year"]) for a in answers] == [
        ("x, a/b", "2023"),
        ("y, a/b", "2023"),
        ("t, own", "2025"),
        ("z, a/b", None),
    ]
    before = Path("out.jsonl").read_bytes()
    done = smol(pattern, "--prompt", "{text}, {land}", "--fields", "year", "-o", "out.jsonl")
    assert (done.exit_code, Path("out.jsonl").read_bytes()) == (0, before)
    assert smol(pattern, "--prompt", "{year}", "--check").exit_code == 3  # one is missing
    assert "did you mean 'year'" in smol(pattern, "--prompt", "{yaer}", "--check").stderr
    assert smol(pattern, "--prompt", "{text}", "--fields", "*", "-o", "all.csv").exit_code == 0
    assert Path("all.csv").read_text().startswith("chat_id,year,land,text,")
