"""SQLite databases as input and as output."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fakes import DyingBackend, EchoBackend
from run_tools import answer, results
from typer.testing import CliRunner

from smolcli.batch.input_scan import scan_input
from smolcli.cli.main import app
from smolcli.data.reader import read_rows
from smolcli.errors import BackendError, InputError, RunError, UsageError
from smolcli.settings import RowSettings, RunSettings

TEMPLATE = "Summarize: {review}"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sqlite3.Connection]:
    """A connection to `shop.db` in the working directory, which has a table of reviews."""
    monkeypatch.chdir(tmp_path)
    with closing(sqlite3.connect("shop.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE reviews (id INTEGER PRIMARY KEY, review TEXT, stars REAL)")
        rows = [(3, "good", 5.0), (1, "bad, really", 1.5), (2, None, None)]
        database.executemany("INSERT INTO reviews VALUES (?, ?, ?)", rows)
        yield database


def smol(*args: object) -> Any:
    options = ("run", "shop.db", "--prompt", TEMPLATE, "--seed", 1, *args)
    return CliRunner().invoke(app, [str(arg) for arg in options], obj=EchoBackend)


def rows(path: str = "shop.db", **settings: Any) -> list[Any]:
    return [row.value for row in read_rows(Path(path), RowSettings("{review}", **settings))]


def table(name: str, path: str = "shop.db") -> tuple[list[str], list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(path)) as database:
        cursor = database.execute(f'SELECT * FROM "{name}"')
        return [column[0] for column in cursor.description], cursor.fetchall()


def test_rows_of_a_table_are_read_in_the_order_of_their_ids(shop: sqlite3.Connection) -> None:
    found = list(read_rows(Path("shop.db"), RowSettings("{review}", "id", ("stars",))))
    assert [row.number for row in found] == [1, 2, 3]
    assert found[0].value == {
        "chat_id": 1,
        "user_prompt": "bad, really",
        "metadata": {"stars": 1.5},
    }
    assert "must not be empty" in str(found[1].error)


def test_rows_of_a_query_are_read(shop: sqlite3.Connection) -> None:
    shop.execute("CREATE TABLE notes (note)")
    query = "SELECT upper(review) AS review FROM reviews WHERE stars > 1 ORDER BY stars DESC"
    prompts = [row["user_prompt"] for row in rows(query=query)]
    assert prompts == ["GOOD", "BAD, REALLY"]


def test_columns_may_be_query_fields(shop: sqlite3.Connection) -> None:
    query = "SELECT 7 AS chat_id, 'Hi' AS user_prompt, '5' AS top_k, 8.0 AS max_new_tokens"
    [row] = read_rows(Path("shop.db"), RowSettings(query=query))
    assert row.value == {"chat_id": 7, "user_prompt": "Hi", "top_k": 5, "max_new_tokens": 8.0}


def test_cell_that_is_not_text_is_an_error_of_its_row(shop: sqlite3.Connection) -> None:
    shop.execute("UPDATE reviews SET review = CAST(x'ff' AS TEXT) WHERE id = 1")
    shop.execute("UPDATE reviews SET review = x'c3a9' WHERE id = 2")
    first, second, third = read_rows(Path("shop.db"), RowSettings("{review}"))
    assert "'review': the value is not UTF-8 text" in str(first.error)
    assert [second.value, third.value] == [
        {"chat_id": "2", "user_prompt": "é"},
        {"chat_id": "3", "user_prompt": "good"},
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"table": "revews"}, "no table named 'revews'; the tables are: reviews, stars"),
        ({}, "choose the rows with --table or --query; the tables are: reviews, stars"),
        ({"query": "SELEC 1"}, "--query: "),
        ({"query": "SELECT locked FROM reviews"}, "--query: no such column: locked"),
        ({"query": "DELETE FROM reviews"}, "--query: "),
        ({"query": "SELECT id FROM reviews"}, "no column named 'review'"),
    ],
)
def test_wrong_choice_of_rows_is_explained(
    shop: sqlite3.Connection, settings: dict[str, Any], said: str
) -> None:
    shop.execute("CREATE VIEW stars AS SELECT stars FROM reviews")
    with pytest.raises(UsageError, match=said):
        rows(**settings)
    assert shop.execute("SELECT count(*) FROM reviews").fetchone() == (3,)


def test_databases_that_cannot_be_read_are_explained(shop: sqlite3.Connection) -> None:
    Path("text.db").write_text("hello")
    Path("q.csv").write_text("review\nx\n")
    with pytest.raises(InputError, match="it is not an SQLite database"):
        rows("text.db")
    with pytest.raises(InputError, match=r"cannot read missing\.db: No such file"):
        rows("missing.db")
    with pytest.raises(UsageError, match="--table needs an SQLite database"):
        rows("q.csv", table="reviews")
    both = smol("--table", "a", "--query", "b")
    assert "--table and --query cannot be combined" in both.stderr


def test_results_are_a_table_in_the_same_database(shop: sqlite3.Connection) -> None:
    args = ("-o", "shop.db", "--output-table", "answers", "--fields", "stars")
    assert smol("--table", "reviews", "--id-column", "id", *args).exit_code == 3
    header, (first, second, _) = table("answers")
    assert header[:3] == ["chat_id", "stars", "response"]
    assert first[:2] == ("1", 1.5)
    assert first[2].startswith("Summarize: bad, really (")
    assert second[header.index("error_code")] == "missing_field"
    assert shop.execute("SELECT count(*) FROM reviews").fetchone() == (3,)
    again = smol("--table", "reviews", "--id-column", "id", *args)
    assert "there is nothing to do" in again.stderr
    shop.execute("DROP TABLE answers")
    assert smol("--table", "reviews", "--id-column", "id", *args).exit_code == 3
    assert len(table("answers")[1]) == 3


def test_other_tables_are_not_replaced(shop: sqlite3.Connection) -> None:
    shop.execute("CREATE TABLE notes (note)")
    for name, said in (("reviews", "reads the table"), ("Notes", "already has a table 'Notes'")):
        done = smol("--table", "reviews", "-o", "shop.db", "--output-table", name)
        assert (done.exit_code, said in done.stderr) == (2, True)
    args = ("--table", "reviews", "-o", "shop.db", "--output-table", "notes", "--overwrite")
    assert smol(*args).exit_code == 3
    assert len(table("notes")[1]) == 3
    Path("text.db").write_text("hello")
    assert "is not an SQLite database" in smol("-o", "text.db").stderr


def test_edits_survive_a_run_with_nothing_to_do(shop: sqlite3.Connection) -> None:
    """Running a complete command again dropped the user's labels and reverted edits."""
    args = ("--table", "reviews", "--id-column", "id", "-o", "shop.db")
    smol(*args)
    shop.execute("ALTER TABLE results ADD COLUMN label")
    shop.execute("UPDATE results SET label = 'wrong' WHERE line = 1")
    shop.execute("UPDATE results SET response = 'Better' WHERE line = 1")
    assert "there is nothing to do" in smol(*args).stderr
    assert shop.execute("SELECT label FROM results").fetchall() == [("wrong",), (None,), (None,)]
    smol(*args, "--dtype", "float32")  # opens the backend, to see whether its answers would differ
    assert shop.execute("SELECT response FROM results LIMIT 1").fetchone() == ("Better",)
    shop.execute("INSERT INTO reviews VALUES (4, 'new', 3)")
    assert smol(*args).exit_code == 3
    assert [row[1][:9] for row in table("results")[1] if row[1]] == ["Summarize"] * 3
    assert smol(*args, "--overwrite").exit_code == 3
    assert "label" not in table("results")[0]
    shop.execute("DELETE FROM results WHERE line = 2")
    smol(*args)
    assert len(table("results")[1]) == 4


def test_a_name_that_no_table_can_have_is_rejected_before_the_run(
    shop: sqlite3.Connection,
) -> None:
    """A view or a reserved name was an error only after every row was answered."""
    shop.execute("CREATE VIEW good AS SELECT 1")
    shop.execute("CREATE INDEX by_stars ON reviews (stars)")
    shop.execute("CREATE TRIGGER trigger DELETE ON reviews BEGIN SELECT 1; END")
    for name, said in (
        ("good", "shop.db has a view named 'good'"),
        ("BY_STARS", "shop.db has an index named 'BY_STARS'"),
        ("SQLite_x", "SQLite reserves the name 'SQLite_x'"),
        ("", "--output-table is empty"),
    ):
        args = ("--table", "reviews", "-o", "shop.db", "--output-table", name, "--overwrite")
        done = smol(*args)
        assert (done.exit_code, said in done.stderr) == (2, True), name
    assert [path.name for path in Path().iterdir()] == ["shop.db"]
    assert smol("--table", "reviews", "-o", "shop.db", "--output-table", "trigger").exit_code == 3


@pytest.mark.parametrize(
    "chosen",
    [
        ("--query", "SELECT * FROM Results ORDER BY id"),
        (
            "--query",
            "SELECT 1 AS review, count(*) FROM (SELECT * FROM good UNION ALL VALUES (1,2,3))",
        ),
        ("--table", "good"),
        ("--table", "results"),
    ],
)
def test_the_tables_that_are_read_are_never_replaced(
    shop: sqlite3.Connection, chosen: tuple[str, str]
) -> None:
    shop.execute("ALTER TABLE reviews RENAME TO results")
    shop.execute("CREATE VIEW good AS SELECT * FROM results WHERE stars > 4")
    done = smol(*chosen, "-o", "shop.db", "--overwrite")
    assert (done.exit_code, "this run reads the table 'results'" in done.stderr) == (2, True)
    assert shop.execute("SELECT count(*) FROM results").fetchone() == (3,)


def test_the_only_table_is_never_replaced(shop: sqlite3.Connection) -> None:
    shop.execute("ALTER TABLE reviews RENAME TO results")
    assert "this run reads the table 'results'" in smol("-o", "shop.db", "--overwrite").stderr
    assert shop.execute("SELECT count(*) FROM results").fetchone() == (3,)


def test_run_over_a_database_resumes(shop: sqlite3.Connection) -> None:
    """Changes to other tables do not matter; a changed row is named."""
    select = RowSettings(TEMPLATE, query="SELECT * FROM reviews ORDER BY id")
    job = RunSettings(Path("shop.db"), Path("out.jsonl"), seed=1, rows=select)
    whole = RunSettings(Path("shop.db"), Path("whole.jsonl"), seed=1, rows=select)
    answer(whole)
    with pytest.raises(BackendError):
        answer(job, lambda settings: DyingBackend(1, window=1))
    shop.execute("CREATE TABLE notes (note)")
    answer(job)
    assert results(Path("out.jsonl")) == results(Path("whole.jsonl"))
    shop.execute("UPDATE reviews SET review = 'new' WHERE id = 3")
    with pytest.raises(UsageError, match="changed at line 3"):
        answer(job)


def test_a_run_that_fails_closes_the_database(shop: sqlite3.Connection) -> None:
    """It stayed open, and locked, for as long as the error was referenced."""
    shop.executemany("INSERT INTO reviews (review) VALUES (?)", [("good",)] * 1000)
    job = RunSettings(Path("shop.db"), Path("out.jsonl"), rows=RowSettings(TEMPLATE))
    with pytest.raises(BackendError) as failed:
        answer(job, lambda settings: DyingBackend(1, window=1))
    shop.execute("PRAGMA busy_timeout = 0")
    shop.execute("DROP TABLE reviews")
    assert str(failed.value) == "the engine died"


def test_only_changed_rows_end_a_run(shop: sqlite3.Connection) -> None:
    """Other programs may write to other tables meanwhile; the size of the file does not count."""
    select = RowSettings(TEMPLATE, query="SELECT * FROM reviews ORDER BY id")
    scan = scan_input(RunSettings(Path("shop.db"), Path("out.jsonl"), rows=select))
    shop.execute("CREATE TABLE notes (note)")
    scan.check_unchanged()
    shop.execute("UPDATE reviews SET review = 'new' WHERE id = 3")
    with pytest.raises(RunError, match=r"shop\.db changed while it was being read"):
        scan.check_unchanged()


def test_locked_database_is_an_error_that_keeps_the_answers(shop: sqlite3.Connection) -> None:
    Path("q.jsonl").write_text('{"chat_id": "1", "user_prompt": "Hi"}\n')
    job = RunSettings(Path("q.jsonl"), Path("shop.db.results.jsonl"), seed=1, table=Path("shop.db"))
    shop.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunError, match="another program has locked the database"):
        answer(job)
    shop.execute("ROLLBACK")
    answer(job)
    assert table("results")[1][0][0] == "1"


@pytest.mark.parametrize("statement", ["ATTACH 'new.db' AS new", "VACUUM INTO 'new.db'"])
def test_a_query_cannot_write_another_database(shop: sqlite3.Connection, statement: str) -> None:
    """It was rejected, but only after it had created the file."""
    with pytest.raises(UsageError, match="--query must be a SELECT that returns rows"):
        rows(query=statement)
    assert not Path("new.db").exists()


def test_every_value_fits_into_a_table(shop: sqlite3.Connection) -> None:
    """Column names that differ in case, integers beyond 64 bits, and mixed types."""
    lines = [
        {"id": 2**70, "ID": "x", "odd": [1], "n": 1},
        {"id": 1, "ID": 3, "odd": None, "n": 2.5},
    ]
    Path("q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["run", "q.jsonl", "--prompt", "Hi {n}", "--fields", "*", "-o", "new.sqlite"]
    assert CliRunner().invoke(app, args, obj=EchoBackend).exit_code == 0
    header, found = table("results", "new.sqlite")
    assert header[1:5] == ["id", "ID_", "odd", "n"]
    assert [row[1:5] for row in found] == [
        (str(2**70), "x", "[1]", 1.0),
        ("1", "3", None, 2.5),
    ]
