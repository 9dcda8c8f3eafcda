"""Tables as input and as output."""

import csv
import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pandas
import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from fakes import DyingBackend, EchoBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_tools import smol_without
from typer.testing import CliRunner

from smolcli.batch.chat_ids import ChatIds
from smolcli.batch.progress import LogProgress
from smolcli.batch.queries import QueryReader
from smolcli.batch.runner import run_file
from smolcli.cli.main import app
from smolcli.data.arrow import arrow_to_json
from smolcli.data.csv import read_csv
from smolcli.data.jsonl import MAX_LINE_BYTES
from smolcli.data.prompt_template import Template, options_hint
from smolcli.data.reader import read_rows
from smolcli.data.rows import Row
from smolcli.data.source import open_source
from smolcli.errors import BackendError, InputError, QueryError, ResumeError, UsageError
from smolcli.settings import QueryDefaults, RowSettings, RunSettings
from smolcli.types import Query

REPOSITORY = Path(__file__).parent.parent
REVIEWS = REPOSITORY / "sample_inputs" / "reviews.csv"
FEW_EXAMPLES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ASK = RowSettings("Summarize: {review}", "id", ("product", "stars"))


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def cells(path: Path, delimiter: str = ",") -> list[Row]:
    with open_source(path) as file:
        return list(read_csv(file, path, delimiter, list))


def items(path: Path, settings: RowSettings) -> list[Any]:
    return list(QueryReader(read_rows(path, settings), QueryDefaults(), ChatIds()))


def test_reading_keeps_a_larger_limit_of_the_csv_module(tmp_path: Path) -> None:
    """The limit belongs to the whole process, so LLM.run lowered that of its caller."""
    before = csv.field_size_limit(1 << 30)
    try:
        (tmp_path / "in.csv").write_text("a,b\n1,2\n")
        assert list(read_rows(tmp_path / "in.csv", RowSettings(prompt="{a}")))
        assert csv.field_size_limit() == 1 << 30
    finally:
        csv.field_size_limit(before)


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


NESTED = {
    "a": {"b": "x", "label": "z", "c": [{"d": 1}]},
    "a.e": "dotted",
    "json": '{"f": "y"}',
    "null": None,
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a.b}", "x"),
        ("{a.c.0.d}", "1"),
        ("{a.e}", "dotted"),
        ("{json.f}", "y"),
        ("{a.b}{null.g}", "x"),
        ("{a.c}", '[{"d": 1}]'),
    ],
)
def test_template_names_members_of_nested_columns(template: str, text: str) -> None:
    assert Template(template).render(NESTED) == text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{a.labl}", "'a.labl': there is no member 'labl'; did you mean 'label'?"),
        ("{a.b.c}", "'a.b.c': there is no member 'c'"),
        ("{a.c.7}", "there is no member '7'"),
        ("{z.b}", "no column named 'z.b'"),
    ],
)
def test_missing_member_is_an_error_of_its_row(template: str, said: str) -> None:
    with pytest.raises(QueryError, match=re.escape(said)):
        Template(template).render(NESTED)


def test_nested_columns_are_read_from_tables(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = [{"meta": {"id": "k1", "text": "one"}, "other": 1}, {"meta": None, "other": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = items(path, RowSettings("Say {meta.text}", "meta.id", ("meta.text",)))
    assert (first.chat_id, prompt(first)) == ("k1", "Say one")
    assert first.metadata == {"meta.text": "one"}
    assert (second.chat_id, second.error) == (None, "'meta.id' must not be empty")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_all_columns_can_be_copied(tmp_path: Path, suffix: str) -> None:
    """A column that has the name of a result column stays in the metadata."""
    path = write(tmp_path / "in.csv", "chat_id,text,error,stars\n1,a,none,5\n2,,x,3\n")
    output = tmp_path / f"out{suffix}"
    assert smol("run", path, "--prompt", "{text}", "--fields", "*", "-o", output).exit_code == 3
    if suffix == ".jsonl":
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert records[0]["metadata"] == {"text": "a", "error": "none", "stars": "5"}
        assert records[1]["metadata"] == {"text": None, "error": "x", "stars": "3"}
    else:
        first, second = csv.DictReader(output.read_text().splitlines())
        assert list(first)[:3] == ["chat_id", "text", "stars"]
        assert (first["stars"], first["error"], first["metadata"]) == ("5", "", '{"error": "none"}')
        assert second["error_code"] == "missing_field"


@pytest.mark.parametrize("name", ["x.arrow", "x.feather", "x.ipc", "x"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_arrow_files_are_read(tmp_path: Path, name: str, is_stream: bool) -> None:
    table = pyarrow.table({"id": range(600), "text": [f"t{n}" for n in range(600)]})
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(str(tmp_path / name), table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    found = items(tmp_path / name, RowSettings("Say {text}", "id"))
    assert [(item.chat_id, item.line) for item in found] == [(str(n), n + 1) for n in range(600)]
    assert prompt(found[-1]) == "Say t599"


@pytest.mark.parametrize("suffix", [".arrow", ".feather", ".ipc"])
def test_results_can_be_an_arrow_file(tmp_path: Path, suffix: str) -> None:
    job = table_job(tmp_path, suffix)
    run(job)
    with pyarrow.OSFile(str(job.table)) as file:
        rows = pyarrow.ipc.open_file(file).read_all().to_pylist()
    assert rows[0]["chat_id"] == "r01"
    assert [row["line"] for row in rows][:3] == [2, 3, 5]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.parquet", None, "No such file or directory"),
        ("x.arrow", None, "No such file or directory"),
        ("x.parquet", b"PAR1, really", "it is not a valid Parquet file, or it is damaged"),
        ("x.arrow", b"ARROW1, really", "it is not a valid Arrow file, or it is damaged"),
        ("x.feather", b"\xff\xff\xff\xff", "it is not a valid Arrow file, or it is damaged"),
    ],
)
def test_unreadable_table_is_named_with_the_reason(
    tmp_path: Path, name: str, data: bytes | None, said: str
) -> None:
    """The message used to quote pyarrow."""
    if data is not None:
        write(tmp_path / name, data)
    with pytest.raises(InputError, match=f"cannot read {re.escape(str(tmp_path / name))}: {said}"):
        items(tmp_path / name, RowSettings("{text}"))


def test_symbolic_link_to_a_table_stays_one(tmp_path: Path) -> None:
    """The link used to be replaced by the table."""
    target = tmp_path / "data" / "real.csv"
    target.parent.mkdir()
    (tmp_path / "out.csv").symlink_to(target)
    run(table_job(tmp_path, ".csv"))
    assert (tmp_path / "out.csv").is_symlink()
    assert target.read_text().startswith("chat_id,")


def test_unions_and_run_end_encoded_columns_are_read(tmp_path: Path) -> None:
    """Parquet has neither, Arrow has both. Dates that Python cannot represent gave a traceback."""
    types, values = (
        pyarrow.array([0, 1, 0], pyarrow.int8()),
        pyarrow.array([0, 0, 1], pyarrow.int32()),
    )
    numbers, texts = pyarrow.array([1, None]), pyarrow.array(["x"])
    far = pyarrow.array([FAR, None], pyarrow.timestamp("s"))
    columns = {
        "dense": pyarrow.UnionArray.from_dense(types, values, [numbers, texts]),
        "far": pyarrow.UnionArray.from_dense(types, values, [far, texts]),
        "ends": pyarrow.RunEndEncodedArray.from_arrays([2, 3], ["a", None]),
    }
    table = pyarrow.table(columns)
    with pyarrow.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = items(tmp_path / "x.arrow", RowSettings("Say {dense} {ends}", None, tuple(columns)))
    assert [prompt(item) for item in found[:2]] == ["Say 1 a", "Say x a"]
    assert found[0].metadata["far"] == "+11476-08-15T05:20:00"
    assert found[1].metadata == {"dense": "x", "far": "x", "ends": "a"}
    assert "must not be empty" in found[2].error


def test_template_may_be_in_a_file(tmp_path: Path) -> None:
    template = write(tmp_path / "template.txt", "Summarize:\n{review}\n")
    output = tmp_path / "out.jsonl"
    done = smol("run", REVIEWS, "--prompt-file", template, "--limit", 1, "-o", output)
    assert done.exit_code == 0
    assert json.loads(output.read_text())["response"].startswith("Summarize: ")
    both = smol("run", REVIEWS, "--prompt-file", template, "--prompt", "{review}", "--check")
    assert (both.exit_code, "cannot be combined" in both.stderr) == (2, True)


def test_template_holds_columns_and_braces() -> None:
    template = Template("{a} and {{{the b}}}: {a}")
    assert template.columns == ["a", "the b"]
    assert template.render({"a": "x", "the b": 1.5}) == "x and {1.5}: x"
    assert template.render({"a": None, "the b": ["é"]}) == ' and {["é"]}: '


@pytest.mark.parametrize(
    ("placeholder", "column"),
    [
        ("{time: start}", "time: start"),
        ("{done!}", "done!"),
        ("{a!r}", "a!r"),
        ("{ padded }", " padded "),
        ("{a.b}", "a.b"),
        ("{x[0]}", "x[0]"),
        ("{Price {USD}}", "Price {USD}"),
        ("{Price {{USD}}}", "Price {USD}"),
        ('{"Price {USD}"}', "Price {USD}"),
        ('{"{"}', "{"),
        ('{"{{x}}"}', "{{x}}"),
        ('{"\\"quoted\\""}', '"quoted"'),
        ('{5" screen}', '5" screen'),
        ("{größe}", "größe"),
    ],
)
def test_any_column_can_be_named(placeholder: str, column: str) -> None:
    """Spreadsheets export names with colons and braces, which str.format reserves."""
    template = Template(f"{{{{{placeholder}}}}}")
    assert template.render({column: "x"}) == "{x}"


@given(st.text(min_size=1))
def test_hint_names_the_column_so_that_it_is_found(column: str) -> None:
    prompt = options_hint([column]).partition("--prompt '")[2].removesuffix("'")
    assert Template(prompt).columns == [column]


@pytest.mark.parametrize("text", ["{", "}", "{}", "none", "", "{{a}}", "{a", "a}"])
def test_invalid_template_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="--prompt"):
        Template(text)


# rows of CSV


def test_rows_are_numbered_by_the_line_they_begin_on(tmp_path: Path) -> None:
    data = '\ufeffa,b\r\n\r\n1,"two\r\nlines"\r\n\ufeff\r\n\ufeff3,\r\n'
    want = [Row(3, {"a": "1", "b": "two\r\nlines"}), Row(6, {"a": "3", "b": None})]
    assert cells(write(tmp_path / "x.csv", data)) == want
    assert cells(write(tmp_path / "x.csv.gz", gzip.compress(data.encode()))) == want
    assert cells(write(tmp_path / "x.tsv", data.replace(",", "\t")), "\t") == want


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"1", "the row has 1 cell, but the header has 2"),
        (b"1,2,3", "the row has 3 cells, but the header has 2"),
        (b'1,"open', "not valid CSV"),
        (b'1,"x" y', "not valid CSV"),
        (b"1,\xff", "not valid UTF-8"),
        (b"1," + b"x" * MAX_LINE_BYTES, "longer than 1,048,576 bytes"),
    ],
)
def test_invalid_row_harms_no_other(tmp_path: Path, bad: bytes, said: str) -> None:
    """An open quote used to swallow what followed, up to the next quote in the file."""
    rows = cells(write(tmp_path / "x.csv", b'a,b\n0,"ok"\n' + bad + b'\n2,"ok"\n3,ok\n'))
    assert [row.number for row in rows] == [2, 3, 4, 5]
    assert [row.error is None for row in rows] == [True, False, True, True]
    assert said in str(rows[1].error)


@pytest.mark.parametrize(
    "cell", ['"Great" phone', '5" screen', '"unclosed', '""', '"a" "b"', '"', 'say "hi"']
)
def test_quotes_in_a_tsv_file_may_be_literal(tmp_path: Path, cell: str) -> None:
    """Most programs that write TSV quote nothing; a cell that begins with a quote lost its row."""
    text = f'id\treview\n1\t{cell}\n2\t"quoted\tand ""so on"""\n3\tok\n'
    found = [row.value for row in cells(write(tmp_path / "x.tsv", text), "\t")]
    assert found == [
        {"id": "1", "review": None if cell == '""' else cell},
        {"id": "2", "review": 'quoted\tand "so on"'},
        {"id": "3", "review": "ok"},
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_only_columns_in_use_must_be_unique(tmp_path: Path, suffix: str) -> None:
    """In a Parquet file, the first of two columns used to be used silently."""
    names, row = ["id", "review", "notes", "notes", "chat_id", "chat_id"], list("1Nab78")
    path = write(tmp_path / f"x.{suffix}", f"{','.join(names)}\n{','.join(row)}\n")
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table([[cell] for cell in row], names=names), path)
    assert [item.chat_id for item in items(path, RowSettings("{review}", "id"))] == ["1"]
    for ambiguous in (RowSettings("{notes}", "id"), RowSettings("{review}", "id", ("notes",))):
        with pytest.raises(UsageError, match=f"x.{suffix}: more than one column is named 'notes'"):
            items(path, ambiguous)
    with pytest.raises(UsageError, match="more than one column is named 'chat_id'"):
        items(path, RowSettings("{review}"))


def test_table_cells_of_spreadsheets_are_understood(tmp_path: Path) -> None:
    header = "chat_id,user_prompt,logprobs,max_new_tokens,temperature\n"
    body = "".join(f"{n},Hi,{flag},8.0,0.0\n" for n, flag in enumerate(FLAGS))
    found = items(write(tmp_path / "x.csv", header + body), RowSettings())
    assert [item.top_logprobs is not None for item in found] == [True, True, True, False, False]
    assert {item.sampling.max_new_tokens for item in found} == {8}


FLAGS = ["TRUE", "True", "1.0", "False", "0"]


@pytest.mark.parametrize(("data", "said"), [("", "empty"), ('"a\n', "header")])
def test_invalid_header_is_rejected(tmp_path: Path, data: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        cells(write(tmp_path / "x.csv", data))


CELLS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(CELLS, CELLS), max_size=8))
def test_any_text_that_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *pairs])
    assert [row.value for row in cells(path)] == [
        {"a": a or None, "b": b or None} for a, b in pairs
    ]


# queries of rows


def test_rows_with_other_columns_get_a_hint_to_the_options(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl", '{"id": 1, "question": "Hi"}\n{"id": 2, "user_promt": "Hi"}\n'
    )
    first, second = items(path, RowSettings())
    assert first.error.endswith("map the columns with --prompt '{question}' --id-column id")
    assert second.error.startswith("unknown field 'id'")
    for name, member in (("data", ".data"), ("my data", '.["my data"]'), ("naïf", '.["naïf"]')):
        write(path, f'{{"version": 1, "{name}": [{{"question": "Hi"}}], "more": []}}')
        (whole,) = items(path, RowSettings())
        assert whole.error.endswith(f"holds the rows, extract them first: jq -c '{member}[]'")


def test_prompt_turns_table_rows_into_queries() -> None:
    got = items(REVIEWS, ASK)
    assert [item.chat_id for item in got] == [f"r{n:02}" for n in range(1, 13)]
    assert [item.line for item in got][:3] == [2, 3, 5]
    assert prompt(got[1]).endswith("first day.\nThe shop would not take it back.")
    assert got[1].metadata == {"product": "kettle", "stars": "1"}
    assert got[7].metadata == {"product": "notebook", "stars": None}
    assert (got[10].error, got[10].field) == ("'review' must not be empty", "review")
    assert got[10].metadata == {"product": "umbrella", "stars": "2"}


def test_line_number_is_the_default_id(tmp_path: Path) -> None:
    assert [i.chat_id for i in items(REVIEWS, RowSettings("{review}"))][:3] == ["2", "3", "5"]
    path = write(tmp_path / "x.csv", "chat_id,t\na,x\n,y\n")
    assert [i.chat_id for i in items(path, RowSettings("{t}"))] == ["a", None]


def test_invalid_metadata_is_the_fault_of_its_row(tmp_path: Path) -> None:
    rows = [
        {"user_prompt": "x", "n": 1, "metadata": "y"},
        {"user_prompt": "x", "n": 2, "metadata": {"n": 0, "m": 3}},
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    bad, good = items(path, RowSettings(None, None, ("n",)))
    assert (str(bad.error_code), bad.field) == ("invalid_value", "metadata")
    assert good.metadata["n"] == 2, "a column that is asked for comes first"


def test_json_lines_of_any_shape_can_be_mapped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        '{"n": 1, "text": "one"}\n\n{"n": 2, "txt": "two"}\nnonsense\n[]\n{"n": null, "text": "x"}',
    )
    got = items(path, RowSettings("Say {text}", "n", ("n",)))
    assert (got[0].chat_id, prompt(got[0]), got[0].metadata) == ("1", "Say one", {"n": 1})
    assert [(i.line, str(i.error_code), i.error) for i in got[1:]] == [
        (3, "missing_field", "no column named 'text'; did you mean 'txt'?"),
        (4, "invalid_json", "invalid JSON: Expecting value at column 1"),
        (5, "not_an_object", "a query must be a JSON object, not an array"),
        (6, "missing_field", "'n' must not be empty"),
    ]


@pytest.mark.parametrize(
    "rows",
    [RowSettings("{revew}"), RowSettings("{id}", "revew"), RowSettings("{id}", None, ("revew",))],
)
def test_missing_column_is_rejected_with_a_suggestion(rows: RowSettings) -> None:
    with pytest.raises(UsageError, match=r"no column named 'revew'; did you mean 'review'\?"):
        items(REVIEWS, rows)


def test_table_of_query_fields_needs_no_prompt(tmp_path: Path) -> None:
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
    assert third.error.startswith("max_new_tokens must be a positive integer")


def test_table_without_prompts_gets_a_hint_to_the_options() -> None:
    with pytest.raises(UsageError, match=r"reviews.csv: .*--prompt '\{review\}' --id-column id"):
        items(REVIEWS, RowSettings())


# Parquet


def test_parquet_rows_become_queries_with_their_values(tmp_path: Path) -> None:
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


UTC_NOON = datetime(2024, 2, 29, 12, 0, tzinfo=UTC)
FAR = 300_000_000_000  # seconds, in the year 11476
NS = 1_709_208_000_123_456_789
DAY = timedelta(days=1, hours=2, minutes=3, seconds=4)
ARROW_VALUES: list[tuple[Any, Any, Any]] = [
    (pyarrow.bool_(), True, True),
    (pyarrow.int8(), -5, -5),
    (pyarrow.uint64(), 2**64 - 1, 2**64 - 1),
    (pyarrow.float16(), 0.5, 0.5),
    (pyarrow.float32(), 0.1, 0.1),
    (pyarrow.float32(), 1e-10, 1e-10),
    (pyarrow.float32(), float("nan"), None),
    (pyarrow.float64(), float("nan"), None),
    (pyarrow.float64(), float("inf"), None),
    (pyarrow.string(), "é", "é"),
    (pyarrow.large_string(), "x", "x"),
    (pyarrow.string_view(), "x", "x"),
    (pyarrow.binary(), "é".encode(), "é"),
    (pyarrow.binary(2), b"ab", "ab"),
    (pyarrow.large_binary(), b"ab", "ab"),
    (pyarrow.decimal128(5, 2), Decimal("1.50"), "1.50"),
    (pyarrow.decimal256(60, 0), Decimal(10**50), str(10**50)),
    (pyarrow.date32(), date(2024, 2, 29), "2024-02-29"),
    (pyarrow.date64(), date(1900, 3, 1), "1900-03-01"),
    (pyarrow.time32("s"), time(23, 59, 58), "23:59:58"),
    (pyarrow.time64("us"), time(1, 2, 3, 4), "01:02:03.000004"),
    (pyarrow.time64("ns"), 3_600_000_000_001, "01:00:00.000000001"),
    (pyarrow.timestamp("s"), FAR, "+11476-08-15T05:20:00"),
    (pyarrow.timestamp("s"), -FAR, "-7537-05-18T18:40:00"),
    (pyarrow.timestamp("us"), UTC_NOON.replace(tzinfo=None), "2024-02-29T12:00:00"),
    (pyarrow.timestamp("ns"), NS, "2024-02-29T12:00:00.123456789"),
    (pyarrow.timestamp("ms", "UTC"), UTC_NOON, "2024-02-29T12:00:00+00:00"),
    (pyarrow.timestamp("us", "Europe/Berlin"), UTC_NOON, "2024-02-29T13:00:00+01:00"),
    (pyarrow.timestamp("us", "-03:30"), UTC_NOON, "2024-02-29T08:30:00-03:30"),
    (pyarrow.timestamp("s", "UTC"), FAR, "+11476-08-15T05:20:00+00:00"),
    (pyarrow.duration("us"), DAY, "1 day, 2:03:04"),
    (pyarrow.duration("s"), timedelta(seconds=-1), "-1 day, 23:59:59"),
    (pyarrow.duration("ns"), 1_000_000_001, "0:00:01.000000001"),
    (pyarrow.month_day_nano_interval(), (14, 3, 1_500_000_000), "P14M3DT1.500000S"),
    (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "x", "x"),
    (pyarrow.list_(pyarrow.int8()), [1, None], [1, None]),
    (pyarrow.list_(pyarrow.date32(), 1), [date(2024, 2, 29)], ["2024-02-29"]),
    (pyarrow.large_list(pyarrow.float64()), [float("nan")], [None]),
    (pyarrow.struct({"t": pyarrow.time64("ns")}), {"t": 1}, {"t": "00:00:00.000000001"}),
    (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [("a", 1)], {"a": 1}),
    (pyarrow.map_(pyarrow.int8(), pyarrow.date32()), [(1, date(2024, 2, 29))], {"1": "2024-02-29"}),
    (pyarrow.uuid(), UUID(int=5).bytes, str(UUID(int=5))),
    (pyarrow.json_(), '{"a": [1]}', {"a": [1]}),
    (pyarrow.bool8(), 1, True),
    (pyarrow.null(), None, None),
]


@pytest.mark.parametrize(("kind", "value", "expected"), ARROW_VALUES)
def test_every_arrow_type_has_a_json_form(kind: Any, value: Any, expected: Any) -> None:
    storage = getattr(kind, "storage_type", kind)
    array = pyarrow.array([None, value], storage)
    if storage is not kind:
        array = pyarrow.ExtensionArray.from_storage(kind, array)
    assert arrow_to_json(array) == [None, expected]
    json.dumps(arrow_to_json(array), allow_nan=False)


def test_parquet_types_survive_a_file(tmp_path: Path) -> None:
    """UUIDs, timestamps beyond Python's years and nanoseconds ended the run with a traceback."""
    path = tmp_path / "x.parquet"
    columns = {
        "id": pyarrow.ExtensionArray.from_storage(
            pyarrow.uuid(), pyarrow.array([UUID(int=1).bytes, None], pyarrow.binary(16))
        ),
        "far": pyarrow.array([FAR, 0], pyarrow.timestamp("ms")).cast(pyarrow.timestamp("ms")),
        "ns": pyarrow.array([NS, None], pyarrow.timestamp("ns")),
        "bytes": pyarrow.array([b"ok", b"\xff"], pyarrow.binary()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    good, bad = items(path, RowSettings("{ns} {far} {bytes}", None, ("id",)))
    assert prompt(good) == "2024-02-29T12:00:00.123456789 1979-07-05T05:20:00 ok"
    assert good.metadata == {"id": str(UUID(int=1))}
    assert (bad.field, "not UTF-8" in bad.error) == ("bytes", True), "the error of its row alone"
    assert len(items(path, RowSettings("{ns}"))) == 2, "only cells in use are converted"


@pytest.mark.parametrize("number", [1.0, 2.0])
def test_whole_float_ids_are_integers(tmp_path: Path, number: float) -> None:
    """pandas turns a column of integers into floats where one is missing."""
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"id": [number, None], "t": ["a", "b"]})
    pyarrow.parquet.write_table(table, path)
    first, second = items(path, RowSettings("{t}", "id"))
    assert first.chat_id == str(int(number))
    assert second.field == "id"


def test_invalid_parquet_file_is_rejected(tmp_path: Path) -> None:
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


def test_table_equals_the_journal(tmp_path: Path) -> None:
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


def test_parquet_columns_have_the_types_of_their_values(tmp_path: Path) -> None:
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


def written_table(folder: Path, suffix: str, texts: Sequence[Any]) -> Path:
    """A table with these values in its column `note`."""
    lines = (json.dumps({"chat_id": str(n), "note": text}) for n, text in enumerate(texts))
    path = write(folder / "in.jsonl", "".join(f"{line}\n" for line in lines))
    job = table_job(folder, suffix, RowSettings("{chat_id}", None, ("note",)), path)
    run(replace(job, overwrite=True))
    assert job.table is not None
    return Path(job.table)


@FEW_EXAMPLES
@given(st.lists(st.text(st.characters(codec="utf-8") | st.sampled_from('\r\n\t,;" ')), min_size=1))
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_any_text_survives_in_any_reader(tmp_path: Path, suffix: str, texts: list[str]) -> None:
    """A lone carriage return in a cell made a file that neither Python nor pyarrow could read."""
    path = written_table(tmp_path, suffix, texts)
    delimiter = "\t" if suffix == ".tsv" else ","
    assert [row["note"] for row in csv_rows(path, delimiter)] == texts
    assert [row.value["note"] or "" for row in cells(path, delimiter)] == texts  # type: ignore[index]
    parsed = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={"note": pyarrow.string()}),
    )
    assert parsed["note"].to_pylist() == texts
    if not any("\0" in text for text in texts):  # pandas ends a cell there
        frame = pandas.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False)
        assert frame["note"].tolist() == texts


@FEW_EXAMPLES
@given(
    st.lists(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8"), max_size=3)
        | st.just([1]),
        min_size=1,
    )
)
def test_fields_of_mixed_types_never_lose_answers(tmp_path: Path, values: list[Any]) -> None:
    """A column of integers beyond 2^53 and fractions used to fail when all was answered."""
    table = pyarrow.parquet.read_table(written_table(tmp_path, ".parquet", values))
    assert table["response"].null_count == 0
    for found, value in zip(table["note"].to_pylist(), values, strict=True):
        if isinstance(found, str) and not isinstance(value, str):
            found = json.loads(found)
        assert found == value


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_empty_table_has_a_header(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / "in.csv", "t\n")
    job = table_job(tmp_path, suffix, RowSettings("{t}"), path)
    assert run(job).num_lines == 0
    assert job.table.stat().st_size > 0


def test_interrupted_run_leaves_no_table_and_resumes(tmp_path: Path) -> None:
    job, other = table_job(tmp_path, ".csv"), table_job(tmp_path, ".tsv")
    with pytest.raises(BackendError):
        run_file(job, lambda settings: DyingBackend(num_answers=4), LogProgress())
    assert not job.table.exists()
    assert len(job.output.read_bytes().splitlines()) == 4
    run(job)
    run(other)
    assert job.output.read_bytes() == other.output.read_bytes()
    assert csv_rows(job.table) == csv_rows(other.table, "\t")


def test_complete_table_is_kept_and_a_deleted_one_is_rewritten(tmp_path: Path) -> None:
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
def test_other_prompt_id_or_fields_are_another_run(tmp_path: Path, rows: RowSettings) -> None:
    run(table_job(tmp_path, ".csv"))
    with pytest.raises(ResumeError, match="other settings"):
        run(table_job(tmp_path, ".csv", rows))


def test_foreign_file_is_not_replaced(tmp_path: Path) -> None:
    job = table_job(tmp_path, ".csv")
    write(job.table, "mine")
    with pytest.raises(UsageError, match="was not written by a run"):
        run(job)
    assert job.table.read_bytes() == b"mine"
    run(replace(job, overwrite=True))
    assert len(csv_rows(job.table)) == 12


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--fields", "line"], "--fields line"),
        (["--fields", "id,id"], "distinct column names"),
        (["-o", "x.csv.gz"], "compressed tables"),
        (["-o", str(REVIEWS)], "is the input"),
    ],
)
def test_wrong_usage_exits_with_2(tmp_path: Path, args: Sequence[str], said: str) -> None:
    done = smol("run", REVIEWS, "--prompt", "{review}", "-o", tmp_path / "o.csv", *args)
    assert done.exit_code == 2
    assert said in done.stderr


def test_command_reads_writes_and_checks_tables(tmp_path: Path) -> None:
    path = tmp_path / "o.parquet"
    done = smol("run", REVIEWS, "--prompt", "Say {review}", "--fields", "id,stars", "-o", path)
    assert done.exit_code == 3
    assert str(path) in done.stderr
    assert pyarrow.parquet.read_table(path)["id"].to_pylist()[0] == "r01"
    again = smol("run", path, "--check", "--prompt", "{response}", "--id-column", "id")
    assert again.stdout == "line 11: missing_field: 'response' must not be empty\n"
