"""Tables: rows that become queries, and results that become rows."""

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fakes import DyingBackend, EchoBackend
from hypothesis import given
from hypothesis import strategies as st
from run_tools import smol_without
from typer.testing import CliRunner

from smolcli.batch.progress import LogProgress
from smolcli.batch.queries import ChatIds, QueryReader
from smolcli.batch.runner import run_file
from smolcli.cli.main import app
from smolcli.data.csv import read_csv
from smolcli.data.jsonl import MAX_LINE_BYTES
from smolcli.data.prompt_template import Template
from smolcli.data.reader import read_rows
from smolcli.data.rows import Row
from smolcli.errors import BackendError, InputError, ResumeRefused, UsageError
from smolcli.settings import QueryDefaults, RowSettings, RunSettings
from smolcli.types import Query

REPOSITORY = Path(__file__).parent.parent
REVIEWS = REPOSITORY / "sample_inputs" / "reviews.csv"
ASK = RowSettings("Summarize: {review}", "id", ("product", "stars"))


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def cells(path: Path) -> list[Row]:
    return list(read_csv(path, list))


def items(path: Path, settings: RowSettings) -> list[Any]:
    return list(QueryReader(read_rows(path, settings), QueryDefaults(), ChatIds()))


def prompt(query: Query) -> str:
    return query.messages[-1].content


def run(job: RunSettings) -> Any:
    return run_file(job, EchoBackend, LogProgress())


def table_job(folder: Path, suffix: str, rows: RowSettings = ASK, input: Path = REVIEWS) -> Any:
    table = folder / f"out{suffix}"
    journal = folder / f"out{suffix}.jsonl"
    return RunSettings(input, journal, seed=1, rows=rows, table=table)


def smol(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], obj=EchoBackend)


# templates


def test_a_template_holds_columns_and_braces() -> None:
    template = Template("{a} and {{{the b}}}: {a}")
    assert template.columns == ["a", "the b"]
    assert template.render({"a": "x", "the b": 1.5}) == "x and {1.5}: x"
    assert template.render({"a": None, "the b": ["é"]}) == ' and {["é"]}: '


@pytest.mark.parametrize("text", ["{", "}", "{}", "none", "", "{a!r}", "{a:>3}", "{{a}}"])
def test_a_template_that_is_none_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--prompt"):
        Template(text)


# rows of CSV


def test_rows_have_the_physical_line_they_begin_on(tmp_path: Path) -> None:
    data = '\ufeffa,b\r\n\r\n1,"two\r\nlines"\r\n\r\n3,\r\n'
    want = [Row(3, {"a": "1", "b": "two\nlines"}), Row(6, {"a": "3", "b": None})]
    assert cells(write(tmp_path / "x.csv", data)) == want
    assert cells(write(tmp_path / "x.csv.gz", gzip.compress(data.encode()))) == want
    assert cells(write(tmp_path / "x.tsv", data.replace(",", "\t"))) == want


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"1", "the row has 1 cells, the header 2"),
        (b"1,2,3", "the row has 3 cells, the header 2"),
        (b'1,"open', "not valid CSV"),
        (b'1,"x" y', "not valid CSV"),
        (b"1,\xff", "not UTF-8"),
        (b"1," + b"x" * MAX_LINE_BYTES, "longer than 1,048,576 bytes"),
    ],
)
def test_a_bad_row_costs_no_other(tmp_path: Path, bad: bytes, said: str) -> None:
    """An open quote used to swallow what followed, up to the next quote in the file."""
    rows = cells(write(tmp_path / "x.csv", b'a,b\n0,"ok"\n' + bad + b'\n2,"ok"\n3,ok\n'))
    assert [row.number for row in rows] == [2, 3, 4, 5]
    assert [row.fault is None for row in rows] == [True, False, True, True]
    assert said in str(rows[1].fault)


@pytest.mark.parametrize(
    ("data", "said"), [("", "empty"), ("a,a\n", "more than one column 'a'"), ('"a\n', "header")]
)
def test_a_header_must_be_one(tmp_path: Path, data: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        cells(write(tmp_path / "x.csv", data))


# A lone \r within quotes is kept, but \r\n reads as \n, as it does between rows.
CELLS = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]))


@given(st.lists(st.tuples(CELLS, CELLS), max_size=8))
def test_whatever_csv_writes_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *pairs])
    assert [row.value for row in cells(path)] == [
        {"a": a or None, "b": b or None} for a, b in pairs
    ]


# queries of rows


def test_a_prompt_makes_queries_of_a_table() -> None:
    got = items(REVIEWS, ASK)
    assert [item.chat_id for item in got] == [f"r{n:02}" for n in range(1, 13)]
    assert [item.line for item in got][:3] == [2, 3, 5]
    assert prompt(got[1]).endswith("first day.\nThe shop would not take it back.")
    assert got[1].metadata == {"product": "kettle", "stars": "1"}
    assert got[7].metadata == {"product": "notebook", "stars": None}
    assert (got[10].error, got[10].field) == ("'review' must not be empty", "review")
    assert got[10].metadata == {"product": "umbrella", "stars": "2"}


def test_without_an_id_column_the_line_is_the_id(tmp_path: Path) -> None:
    assert [i.chat_id for i in items(REVIEWS, RowSettings("{review}"))][:3] == ["2", "3", "5"]
    path = write(tmp_path / "x.csv", "chat_id,t\na,x\n,y\n")
    assert [i.chat_id for i in items(path, RowSettings("{t}"))] == ["a", None]


def test_metadata_that_is_no_object_is_that_rows_fault(tmp_path: Path) -> None:
    rows = [
        {"user_prompt": "x", "n": 1, "metadata": "y"},
        {"user_prompt": "x", "n": 2, "metadata": {"n": 0, "m": 3}},
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    bad, good = items(path, RowSettings(None, None, ("n",)))
    assert (str(bad.error_code), bad.field) == ("invalid_value", "metadata")
    assert good.metadata["n"] == 2, "a column that is asked for comes first"


def test_json_lines_of_any_shape_can_be_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        '{"n": 1, "text": "one"}\n\n{"n": 2, "txt": "two"}\nnonsense\n[]\n{"n": null, "text": "x"}',
    )
    got = items(path, RowSettings("Say {text}", "n", ("n",)))
    assert (got[0].chat_id, prompt(got[0]), got[0].metadata) == ("1", "Say one", {"n": 1})
    assert [(i.line, str(i.error_code), i.error) for i in got[1:]] == [
        (3, "missing_field", "there is no column 'text'; did you mean 'txt'?"),
        (4, "invalid_json", "invalid JSON: Expecting value at column 1"),
        (5, "not_an_object", "a query must be a JSON object, not an array"),
        (6, "missing_field", "'n' must not be empty"),
    ]


@pytest.mark.parametrize(
    "rows",
    [RowSettings("{revew}"), RowSettings("{id}", "revew"), RowSettings("{id}", None, ("revew",))],
)
def test_a_column_that_no_row_has_is_wrong_usage(rows: RowSettings) -> None:
    with pytest.raises(UsageError, match=r"no column 'revew'; did you mean 'review'\?"):
        items(REVIEWS, rows)


def test_a_table_of_query_fields_needs_no_prompt(tmp_path: Path) -> None:
    header = "chat_id,user_prompt,max_new_tokens,temperature,stop,messages,metadata\n"
    talk = '"[{""role"": ""user"", ""content"": ""hello""}]"'
    path = write(
        tmp_path / "x.csv",
        f'{header}7,12,5,0.5,7,,"{{""k"": 1}}"\nb,,,,,{talk},\nc,x,many,,,,\n',
    )
    first, second, third = items(path, RowSettings())
    assert (first.chat_id, prompt(first), first.stop, first.metadata) == (
        "7",
        "12",
        ("7",),
        {"k": 1},
    )
    assert (first.sampling.max_new_tokens, first.sampling.temperature) == (5, 0.5)
    assert prompt(second) == "hello"
    assert third.error == "max_new_tokens must be a whole number from 1"


def test_a_table_that_asks_nothing_says_how_to_ask() -> None:
    with pytest.raises(UsageError, match=r"reviews.csv: .*--prompt 'Summarize: \{review\}'"):
        items(REVIEWS, RowSettings())


# Parquet


def test_parquet_rows_are_queries_and_their_values_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    columns = {
        "id": [1, 2, 3],
        "text": ["one", None, "three"],
        "when": [date(2024, 2, 29), None, date(2025, 1, 1)],
        "price": [Decimal("1.50"), Decimal("2.00"), None],
        "score": [0.5, float("nan"), 2.0],
        "picture": [b"\xff", b"\xff", b"\xff"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    got = items(path, RowSettings("{text} at {price}", "id", ("when", "score")))
    assert [prompt(item) for item in got] == ["one at 1.50", " at 2.00", "three at "]
    assert [(item.chat_id, item.line) for item in got] == [("1", 1), ("2", 2), ("3", 3)]
    assert [item.metadata["score"] for item in got] == [0.5, None, 2.0]
    assert got[0].metadata["when"] == "2024-02-29"
    assert "not UTF-8" in items(path, RowSettings("{picture}"))[0].error


def test_what_is_no_parquet_says_so(tmp_path: Path) -> None:
    for name in ("x.parquet", "missing.parquet"):
        write(tmp_path / "x.parquet", "chat_id,user_prompt\n")
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            items(tmp_path / name, RowSettings("{text}"))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", "")
    done = smol_without("pyarrow", "run", path, "--check", "--prompt", "{a}")
    assert done.returncode == 2
    assert b"pip install 'smolcli[parquet]'" in done.stderr


# results as tables


def csv_rows(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def test_the_table_holds_what_the_journal_holds(tmp_path: Path) -> None:
    job = table_job(tmp_path, ".csv")
    report = run(job)
    rows = csv_rows(job.table)
    journal = [json.loads(line) for line in job.output.read_bytes().splitlines()]
    assert report.num_lines == len(rows) == len(journal) == 12
    for row, record in zip(rows, journal, strict=True):
        assert row["chat_id"] == record["chat_id"]
        assert row["response"] == record.get("response", "")
        assert row["product"] == record["metadata"]["product"]
        assert row["line"] == str(record["line"])
    assert (rows[10]["error_code"], rows[10]["completion_tokens"]) == ("missing_field", "")
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.csv",
        "out.csv.jsonl",
        "out.csv.jsonl.manifest.json",
    }


def test_parquet_keeps_types_and_csv_agrees(tmp_path: Path) -> None:
    lines = [
        {"n": 1, "mixed": 1, "yes": True, "big": 2**70, "user": {"a": 1}},
        {"n": 2, "mixed": 0.5, "yes": None, "big": 1, "user": "text"},
    ]
    path = write(tmp_path / "in.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    fields = ("n", "mixed", "yes", "big", "user")
    job = table_job(tmp_path, ".parquet", RowSettings("{n}", None, fields), path)
    run(replace(job, with_timings=True))
    table = pyarrow.parquet.read_table(job.table)
    assert [str(table.schema.field(name).type) for name in ("chat_id", *fields, "total_s")] == [
        *("string", "int64", "double", "bool", "string", "string", "double"),
    ]
    assert table["user"].to_pylist() == ['{"a": 1}', "text"]
    assert table["big"].to_pylist() == [str(2**70), "1"]
    assert table["completion_tokens"].to_pylist() == [1, 1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_empty_table_has_a_header(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / "in.csv", "t\n")
    job = table_job(tmp_path, suffix, RowSettings("{t}"), path)
    assert run(job).num_lines == 0
    assert job.table.stat().st_size > 0


def test_a_run_cut_short_leaves_no_table_and_goes_on(tmp_path: Path) -> None:
    job, other = table_job(tmp_path, ".csv"), table_job(tmp_path, ".tsv")
    with pytest.raises(BackendError):
        run_file(job, lambda settings: DyingBackend(num_answers=4), LogProgress())
    assert not job.table.exists()
    assert len(job.output.read_bytes().splitlines()) == 4
    run(job)
    run(other)
    assert job.output.read_bytes() == other.output.read_bytes()
    assert csv_rows(job.table) == csv_rows(other.table, "\t")


def test_a_complete_table_is_left_alone_and_one_that_is_gone_is_made_again(tmp_path: Path) -> None:
    job = table_job(tmp_path, ".csv")
    run(job)
    first = job.table.read_bytes()
    write(job.table, first + b"a note of mine\n")
    run(job)
    assert job.table.read_bytes().endswith(b"a note of mine\n")
    job.table.unlink()
    run(job)
    assert job.table.read_bytes() == first


@pytest.mark.parametrize(
    "rows",
    [
        replace(ASK, prompt="Other: {review}"),
        replace(ASK, id_column="review"),
        replace(ASK, fields=("product",)),
    ],
)
def test_another_prompt_id_or_fields_are_another_run(tmp_path: Path, rows: RowSettings) -> None:
    run(table_job(tmp_path, ".csv"))
    with pytest.raises(ResumeRefused, match="other settings"):
        run(table_job(tmp_path, ".csv", rows))


def test_a_file_that_no_run_made_is_not_replaced(tmp_path: Path) -> None:
    job = table_job(tmp_path, ".csv")
    write(job.table, "mine")
    with pytest.raises(UsageError, match="no run made it"):
        run(job)
    assert job.table.read_bytes() == b"mine"
    run(replace(job, overwrite=True))
    assert len(csv_rows(job.table)) == 12


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--fields", "line"], "--fields line"),
        (["--fields", "id,id"], "each once"),
        (["-o", "x.csv.gz"], "not packed"),
        (["-o", str(REVIEWS)], "is the input"),
    ],
)
def test_wrong_usage_is_2(tmp_path: Path, args: Sequence[str], said: str) -> None:
    done = smol("run", REVIEWS, "--prompt", "{review}", "-o", tmp_path / "o.csv", *args)
    assert done.exit_code == 2
    assert said in done.stderr


def test_the_command_makes_tables_of_tables_and_checks_them(tmp_path: Path) -> None:
    path = tmp_path / "o.parquet"
    done = smol("run", REVIEWS, "--prompt", "Say {review}", "--fields", "id,stars", "-o", path)
    assert done.exit_code == 3
    assert str(path) in done.stderr
    assert pyarrow.parquet.read_table(path)["id"].to_pylist()[0] == "r01"
    again = smol("run", path, "--check", "--prompt", "{response}", "--id-column", "id")
    assert again.stdout == "line 11: missing_field: 'response' must not be empty\n"
