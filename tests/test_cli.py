"""The command line: stdout, stderr and exit codes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from fakes import DyingBackend, EchoBackend
from typer.testing import CliRunner, Result

from smolcli import __version__
from smolcli.backends.base import OnText, OpenBackend
from smolcli.batch.manifest import load_manifest
from smolcli.cli.main import app
from smolcli.errors import RunError
from smolcli.settings import EngineSettings
from smolcli.types import ErrorCode, Query, failure

REPOSITORY = Path(__file__).parent.parent
SAMPLES = REPOSITORY / "sample_inputs"
GOOD = b'{"chat_id": "1", "user_prompt": "Hi there"}\n'
BAD = b'{"chat_id": "2"}\n'


def smol(*args: object, backend: OpenBackend | None = EchoBackend, **options: Any) -> Result:
    """Run `smol` in this process with backends of the test; with None, of its own."""
    return CliRunner().invoke(app, [str(arg) for arg in args], obj=backend, **options)


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run `smol` in a separate process."""
    command = [sys.executable, "-m", "smolcli", *(str(arg) for arg in args)]
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, cwd=REPOSITORY, **options)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    """A file with one valid line."""
    path = tmp_path / "queries.jsonl"
    path.write_bytes(GOOD)
    return path


class Seen(EchoBackend):
    """Records the settings and queries that it receives."""

    settings_seen: EngineSettings
    queries_seen: list[Query]

    @classmethod
    def opener(cls) -> tuple["Seen", OpenBackend]:
        seen = cls()
        seen.queries_seen = []

        def open_backend(settings: EngineSettings) -> EchoBackend:
            seen.settings_seen = settings
            return seen

        return seen, open_backend

    def answer(self, query: Query) -> Any:
        self.queries_seen.append(query)
        return super().answer(query)


def test_version_option_prints_the_version() -> None:
    assert smol("--version").stdout == f"smol {__version__}\n"


def test_help_is_shown_without_a_command() -> None:
    help_text = smol().output
    for command in ("run", "ask", "pull"):
        assert command in help_text


def test_help_fits_80_columns() -> None:
    """Names of environment variables and default values were cut off, and flags had a type."""
    group: Any = typer.main.get_command(app)
    for name in (None, *group.commands):
        help_text = smol(*filter(None, [name]), "--help", env={"COLUMNS": "80"}).output
        assert "Show this message" in help_text
        assert [text for text in ("…", "<bool>", "<str>") if text in help_text] == [], name
    run_help = " ".join(smol("run", "--help", env={"COLUMNS": "80"}).output.split())
    assert "run [OPTIONS] INPUT..." in run_help
    assert "--[no-]dedupe" in run_help
    assert "One of auto, smol, openai." in run_help


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "smolcli", "run", "--help"],
        capture_output=True,
        cwd=REPOSITORY,
        check=True,
    )
    imported = {line.split(b"|")[-1].strip() for line in done.stderr.splitlines()}
    assert b"smolcli.cli.options" in imported
    assert not imported & {b"torch", b"transformers", b"numpy", b"tokenizers"}
    assert not imported & {b"smolcli.protocol.query"}


def test_a_check_does_not_import_torch(queries: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "smolcli", "run", str(queries), "--check"]
    done = subprocess.run(command, capture_output=True, cwd=REPOSITORY, check=True)
    imported = {line.split(b"|")[-1].strip() for line in done.stderr.splitlines()}
    assert b"smolcli.batch.validation" in imported
    assert not imported & {b"torch", b"transformers", b"numpy"}


def test_exit_code_is_0_if_all_lines_are_answered_and_3_if_some_fail(queries: Path) -> None:
    done = smol("run", queries)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "answered" in done.stderr
    output = queries.with_name("queries.results.jsonl")
    assert str(output) in done.stderr
    assert json.loads(output.read_bytes())["response"].startswith("Hi there")
    assert smol("run", queries).exit_code == 0
    queries.write_bytes(GOOD + BAD)
    done = smol("run", queries, "--overwrite")
    assert done.exit_code == 3
    assert "failed: missing_field" in done.stderr
    assert smol("run", queries).exit_code == 3


def test_a_failed_run_exits_with_1_and_explains_how_to_resume(queries: Path) -> None:
    done = smol("run", queries, backend=lambda settings: DyingBackend(num_answers=0))
    assert done.exit_code == 1
    assert "has 0 results; run the same command to resume" in done.stderr
    assert done.stderr.splitlines()[-1] == "smol: the engine died"
    assert smol("run", queries.with_name("missing")).exit_code == 1


def test_a_misspelled_input_gets_a_suggestion(queries: Path) -> None:
    misspelled = queries.with_name(f"x{queries.name}")
    done = smol("run", misspelled)
    assert done.exit_code == 1
    assert f"cannot read {misspelled}: No such file or directory; did you mean {queries}?" in (
        done.stderr
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--temperature", "-1"], "--temperature must be a number from 0 (greedy) to 100"),
        (["--top-p", "nan"], "--top-p must be a number greater than 0 and at most 1"),
        (["--max-new-tokens", "0"], "smol: --max-new-tokens must be a positive integer"),
        (["--max-new-tokens", "-1"], "--max-new-tokens must be a positive integer"),
        (["--seed", f"{2**63}"], "--seed must be an integer from -2^63 to 2^63 - 1"),
        (["--presence-penalty", "3"], "--presence-penalty must be a number from -2 to 2"),
        (["--limit", "0"], "--limit"),
        (["--limit", f"{2**63}"], "--limit"),  # used to end in a traceback
        (["--threads", "100000"], "--threads"),  # used to crash torch with a segmentation fault
        (["--dtype", "float16"], "--dtype"),
        (["--no-such-option"], "--no-such-option"),
        (["-o", "no/such/folder/out"], "cannot write no/such/folder/out"),
        (["-o", ""], "of --output or of --output-table is empty"),
    ],
)
def test_wrong_usage_exits_with_2(queries: Path, args: list[str], said: str) -> None:
    done = smol("run", queries, *args)
    assert done.exit_code == 2
    assert said in done.stderr


def test_resuming_with_other_settings_is_wrong_usage(queries: Path) -> None:
    smol("run", queries, "--seed", 1)
    done = smol("run", queries, "--seed", 2)
    assert done.exit_code == 2
    assert "seed was 1, is 2" in done.stderr
    assert "--overwrite" in done.stderr


def test_quiet_prints_errors_only(queries: Path) -> None:
    assert smol("run", queries, "--quiet").output == ""
    queries.write_bytes(b"")
    assert smol("run", queries, "--quiet").stderr.count("\n") == 1


def test_every_option_reaches_the_backend(queries: Path) -> None:
    seen, open_backend = Seen.opener()
    options = {
        "--max-new-tokens": 9, "--temperature": 0.5, "--top-p": 0.9, "--top-k": 4,
        "--repetition-penalty": 1.5, "--min-p": 0.1, "--presence-penalty": 0.5,
        "--frequency-penalty": -0.5, "--min-tokens": 2, "--seed": 3,
        "--system": "Be brief.", "--model": "m",
        "--dtype": "float32", "--device": "cuda", "--threads": 2, "--max-batch-size": 5,
        "--max-concurrency": 6,
    }  # fmt: skip
    done = smol("run", queries, *(part for pair in options.items() for part in pair),
                "--ignore-eos", backend=open_backend)  # fmt: skip
    assert done.exit_code == 0
    assert seen.settings_seen == EngineSettings("m", "float32", "cuda", 2, 5, 6)
    [query] = seen.queries_seen
    sampling = query.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.9)
    assert (sampling.top_k, sampling.repetition_penalty, sampling.min_p) == (4, 1.5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.min_tokens, sampling.ignore_eos) == (2, True)
    assert query.messages[0].content == "Be brief."
    assert load_manifest(queries.with_name("queries.results.jsonl")).seed == 3


@pytest.mark.parametrize(
    ("variables", "concurrency"),
    [
        ({"SMOL_MAX_CONCURRENCY": "3", "HOSTING_MAX_CONCURRENCY": "4"}, 3),
        ({"HOSTING_MAX_CONCURRENCY": "4"}, 4),
        ({}, 8),
    ],
)
def test_the_environment_sets_options(
    queries: Path, variables: dict[str, str], concurrency: int
) -> None:
    seen, open_backend = Seen.opener()
    smol("run", queries, backend=open_backend, env=variables | {"SMOL_MAX_BATCH_SIZE": "2"})
    assert seen.settings_seen.max_concurrency == concurrency
    assert seen.settings_seen.max_batch_size == 2


def test_every_option_has_an_environment_variable() -> None:
    for command in ("run", "ask"):
        help_text = smol(command, "--help", env={"COLUMNS": "200"}).output
        lines = help_text.replace("[no-]", "").splitlines()
        flags = [line.split()[1] for line in lines if line.startswith("│ --")]
        for flag in set(flags) - {"--help"}:
            name = flag[2:].upper().replace("-", "_")
            assert f"SMOL_{name}" in help_text or f"SMOL_{command.upper()}_{name}" in help_text


def test_a_variable_means_the_same_in_every_command() -> None:
    """SMOL_JSON was a flag for `smol ask` and the name of a file for `smol bench`."""
    group: Any = typer.main.get_command(app)
    commands = [*group.commands.values(), *group.commands["models"].commands.values()]
    meanings: dict[str, set[tuple[object, ...]]] = {}
    for parameter in (p for command in commands for p in command.params if p.envvar):
        variables = parameter.envvar
        for variable in [variables] if isinstance(variables, str) else variables:
            meaning = parameter.type_descriptor.annotation, parameter.multiple, parameter.help
            meanings.setdefault(variable, set()).add(meaning)
    ambiguous = {variable for variable, found in meanings.items() if len(found) > 1}
    # the keys that a server accepts and clients send; the same name with and without a flag
    assert ambiguous == {"SMOL_API_KEY", "SMOL_MODEL"}


def test_an_output_in_the_environment_is_not_that_of_a_report(queries: Path) -> None:
    variables = {"SMOL_OUTPUT": str(queries.with_name("out.jsonl"))}
    assert smol("run", queries, env=variables).exit_code == 0
    assert smol("report", variables["SMOL_OUTPUT"], env=variables).exit_code == 0
    assert queries.with_name("out.report.html").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the directory")
def test_current_directory_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error was about writing to stdout."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = smol("serve", "--port", "0", "--batch-dir", "relative")
    assert (done.exit_code, done.stderr) == (1, "smol: the current directory no longer exists\n")


def test_run_options_limit_lines_keep_fields_and_add_timings(queries: Path) -> None:
    queries.write_bytes(b'{"chat_id": "1", "user_prompt": "Hi", "colour": "red"}\n' + BAD)
    args = ("--limit", 1, "--extra-fields", "keep", "--timings", "-o", queries.with_name("out"))
    assert smol("run", queries, *args).exit_code == 0
    [result] = map(json.loads, queries.with_name("out").read_bytes().splitlines())
    assert result["metadata"] == {"colour": "red"}
    assert result["timings"] == {"queue_s": 0.0, "first_token_s": 0.01, "total_s": 0.02}


def test_failed_lines_are_moved_and_retried(queries: Path) -> None:
    def failing(settings: EngineSettings) -> EchoBackend:
        backend = EchoBackend(settings)
        backend.answer = lambda query: failure(query, "no luck", ErrorCode.INTERNAL)  # type: ignore[method-assign]
        return backend

    queries.write_bytes(GOOD + BAD)
    errors, output = queries.with_name("bad.jsonl"), queries.with_name("queries.results.jsonl")
    assert smol("run", queries, "--errors", errors, backend=failing).exit_code == 3
    assert (output.read_bytes(), errors.read_bytes().count(b"\n")) == (b"", 2)
    assert smol("run", queries, "--errors", errors, "--retry-errors").exit_code == 3
    assert (output.read_bytes().count(b"\n"), errors.read_bytes().count(b"\n")) == (1, 1)
    assert smol("run", queries, "--retry-errors", "--overwrite").exit_code == 2


@pytest.fixture
def schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A schema file, next to a module with an equivalent pydantic model."""
    monkeypatch.chdir(tmp_path)
    Path("trips.py").write_text("import pydantic\nclass Trip(pydantic.BaseModel): end: str\n")
    Path("broken.py").write_text("1 / 0")
    Path("list.json").write_text("[]")
    Path("bad.json").write_text('{"type": "nonsense"}')
    Path("cut.json").write_text('{"type":\n "object')
    Path("deep.json").write_text('{"not": ' * 2000 + "{}" + "}" * 2000)
    path = Path("trip.json")
    path.write_text('{"type": "object", "properties": {"end": {"type": "string"}}}')
    return str(path)


def test_schema_applies_to_every_answer(queries: Path, schema: str) -> None:
    """Except answers that set their own; the output is not resumed with another schema, or none."""
    queries.write_bytes(
        GOOD + b'{"chat_id": "2", "user_prompt": "x", "response_format": {"type": "text"}}\n'
    )
    seen, open_backend = Seen.opener()
    assert smol("run", queries, "--schema", schema, backend=open_backend).exit_code == 0
    assert smol("ask", "x", "--schema", "trips:Trip", backend=open_backend).exit_code == 0
    held, free, asked = [query.format for query in seen.queries_seen]
    assert held is not None
    assert asked is not None
    assert free is None
    assert json.loads(held.schema) == json.loads(Path(schema).read_bytes())
    assert json.loads(asked.schema)["required"] == ["end"]
    for options in ([], ["--schema", "trips:Trip"]):
        done = smol("run", queries, *options)
        assert (done.exit_code, "schema was" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("none.json", "No such file"),
        ("trips.py", "invalid JSON: Expecting value at column 1"),
        ("cut.json", "invalid JSON: Unterminated string starting at line 2, column 2"),
        ("deep.json", "invalid JSON: nested more than 64 levels deep"),
        ("list.json", "must contain a JSON object"),
        ("bad.json", "Invalid type: nonsense"),
        ("trips:Journey", "no attribute 'Journey'"),
        ("nowhere:Trip", "No module named 'nowhere'"),
        ("broken:Trip", "ZeroDivisionError"),
    ],
)
def test_invalid_schema_is_rejected_before_the_run(
    queries: Path, schema: str, value: str, reason: str
) -> None:
    done = smol("run", queries, "--schema", value)
    assert done.exit_code == 2
    assert f"--schema {value}" in done.stderr
    assert reason in done.stderr
    assert not list(queries.parent.glob("*.results.jsonl"))


def test_stdout_is_data(queries: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    smol("run", queries, "-o", "-")
    [line] = capfdbinary.readouterr().out.splitlines()
    assert json.loads(line)["chat_id"] == "1"
    assert [path.name for path in queries.parent.iterdir()] == ["queries.jsonl"]


def test_check_lists_every_bad_line_and_leaves_no_file(tmp_path: Path) -> None:
    mixed = Path(shutil.copy(SAMPLES / "mixed.jsonl", tmp_path))
    done = process("run", mixed, "--check")
    assert done.returncode == 3
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 20
    assert lines[0] == "line 4: missing_field: user_prompt is required and cannot be empty"
    assert lines[6].endswith("unknown field 'user_promt'; did you mean 'user_prompt'?")
    assert done.stderr.startswith(b"23 lines, 20 invalid")
    assert list(tmp_path.iterdir()) == [mixed]


@pytest.mark.parametrize(("options", "num_calls"), [([], 1), (["--no-dedupe"], 2)])
def test_equal_queries_are_computed_once(
    tmp_path: Path, options: list[str], num_calls: int
) -> None:
    same = tmp_path / "same.jsonl"
    same.write_bytes(GOOD + GOOD.replace(b'"1"', b'"2"'))
    done = smol("run", same, *options)
    assert done.exit_code == 0, done.output
    report = load_manifest(tmp_path / "same.results.jsonl").statistics
    assert report is not None
    assert (report["model_calls"], report["shared_queries"]) == (num_calls, 2 - num_calls)


@pytest.mark.parametrize("name", ["queries", "multi_turn", "settings"])
def test_sample_queries_are_valid(name: str) -> None:
    done = smol("run", SAMPLES / f"{name}.jsonl", "--check")
    assert (done.exit_code, done.stdout) == (0, "")


def test_mixed_sample_has_every_kind_of_invalid_line(tmp_path: Path) -> None:
    smol("run", SAMPLES / "mixed.jsonl", "-o", tmp_path / "out")
    lines = (tmp_path / "out").read_bytes().splitlines()
    codes = {json.loads(line).get("error_code") for line in lines}
    assert codes == {
        None, "invalid_json", "not_an_object", "missing_field", "invalid_value",
        "unknown_field", "duplicate_chat_id",
    }  # fmt: skip


def test_check_finds_prompts_that_are_too_long(queries: Path, tiny_folder: Path) -> None:
    long = json.dumps({"chat_id": "2", "user_prompt": "word " * 5000}).encode()
    queries.write_bytes(GOOD + long)
    done = process("run", queries, "--check", "--model", tiny_folder)
    assert done.returncode == 3
    assert done.stdout.startswith(b"line 2: prompt_too_long: the prompt is too long: it has ")
    done = process("run", queries, "--check", "--model", "someone/unknown-to-this-disk")
    assert done.returncode == 0
    assert b"prompt lengths not checked" in done.stderr


def test_ask_prints_only_the_answer() -> None:
    done = smol("ask", "Hi there", "--seed", 1)
    assert done.exit_code == 0
    assert done.stdout.startswith("Hi there (")
    assert done.stderr == ""


def test_ask_prints_the_result_as_json() -> None:
    record = json.loads(smol("ask", "Hi", "--json").stdout)
    assert record["chat_id"] == "ask"
    assert record["finish_reason"] == "stop"


@pytest.mark.parametrize("args", [["-"], []])
def test_ask_reads_stdin(args: list[str]) -> None:
    assert smol("ask", *args, input="What is\nthis?").stdout.startswith("What is this? (")


def test_ask_appends_stdin_to_the_question() -> None:
    seen, open_backend = Seen.opener()
    smol("ask", "Summarize this:", input="first\nsecond\n", backend=open_backend)
    smol("ask", "Hi", input=" \n", backend=open_backend)
    contents = [query.messages[-1].content for query in seen.queries_seen]
    assert contents == ["Summarize this:\n\nfirst\nsecond", "Hi"]


def test_ask_reads_question_and_system_prompt_from_files(tmp_path: Path) -> None:
    question, system = tmp_path / "question.txt", tmp_path / "system.txt"
    question.write_bytes(b"\xef\xbb\xbfSummarize\nthis:\r\n")
    system.write_text("Be brief.\n")
    seen, open_backend = Seen.opener()
    args = ("ask", "--prompt-file", question, "--system-file", system)
    smol(*args, backend=open_backend, input="some text\n")
    [query] = seen.queries_seen
    contents = [turn.content for turn in query.messages]
    assert contents == ["Be brief.", "Summarize\nthis:\n\nsome text"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["Hi", "--prompt-file", "q.txt"], "QUESTION and --prompt-file cannot be combined"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt: cannot read the file"),
        (["--prompt-file", "latin1.txt"], "--prompt-file latin1.txt: the file is not UTF-8"),
        (["Hi", "--system", "x", "--system-file", "q.txt"], "cannot be combined"),
        (["What", "is", "gravity?"], "put the question in quotes: smol ask 'What is gravity?'"),
        (["-5", "+", "3?"], "smol ask -- '-5 + 3?'"),
        (["--", "-5", "+", "3?"], "put the question in quotes: smol ask -- '-5 + 3?'"),
        (["--", "-5 + 3?", "--seed", "1"], "-- ends the options; put --seed before it"),
        (["Hi", "--schema", '{"type'], "--schema: invalid JSON"),
        (["Hi", "--schema", '{"type": "nonsense"}'], "--schema: "),
    ],
)
def test_ask_explains_wrong_usage(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes(b"caf\xe9")
    done = smol("ask", *args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


def test_schema_may_be_given_inline(queries: Path) -> None:
    schema = '{"type": "object", "properties": {"end": {"type": "string"}}}'
    seen, open_backend = Seen.opener()
    assert smol("ask", "x", "--schema", schema, backend=open_backend).exit_code == 0
    assert smol("run", queries, "--schema", f" {schema}", backend=open_backend).exit_code == 0
    for query in seen.queries_seen:
        assert query.format is not None
        assert json.loads(query.format.schema) == json.loads(schema)


@pytest.mark.parametrize("question", ["-5 + 3?", "-5?", "--help me please"])
def test_ask_explains_a_question_that_begins_with_a_dash(question: str) -> None:
    done = smol("ask", question)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"smol ask -- {shlex.quote(question)}" in done.stderr
    assert smol("ask", "--", question).stdout.startswith(question)
    assert "No such option: --temprature" in smol("ask", "Hi", "--temprature", "1").stderr


def test_ask_sends_the_system_prompt() -> None:
    seen, open_backend = Seen.opener()
    smol("ask", "Hi", "--system", "Be brief.", backend=open_backend)
    [query] = seen.queries_seen
    assert [turn.content for turn in query.messages] == ["Be brief.", "Hi"]


def test_ask_without_a_question_is_wrong_usage() -> None:
    done = smol("ask", " ")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "the question is empty; try smol ask" in done.stderr


def test_a_single_line_is_not_counted_in_the_plural(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"chat_id": 1, "user_prompt": "Hi"}')
    assert smol("run", path, "--check").stderr.startswith("1 line, 0 invalid")


def test_failed_ask_prints_the_reason_to_stderr() -> None:
    class Failing(EchoBackend):
        def answer(self, query: Query) -> Any:
            return failure(query, "the prompt is too long", ErrorCode.PROMPT_TOO_LONG)

    done = smol("ask", "Hi", backend=Failing)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "smol: the prompt is too long\n"


def read_terminal(ours: int) -> str:
    """All that was written to a pseudoterminal whose other end is closed, or will be."""
    shown = b""
    with open(ours, "rb", buffering=0) as terminal, suppress(OSError):  # Linux' end of file
        while data := terminal.read(4096):
            shown += data
    return shown.decode()


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudoterminal")
def test_ask_streams_to_a_terminal(tiny_folder: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "smolcli", "ask", "Hi", "--max-new-tokens", "8", "--model"]
    with subprocess.Popen(
        [*command, str(tiny_folder)], stdout=theirs, stderr=subprocess.PIPE, cwd=REPOSITORY
    ) as running:
        os.close(theirs)
        shown = read_terminal(ours)
    plain = process("ask", "Hi", "--max-new-tokens", "8", "--model", tiny_folder)
    assert running.returncode == 0
    assert shown.split() == plain.stdout.decode().split()


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudoterminal")
@pytest.mark.parametrize(
    ("end", "said"), [(KeyboardInterrupt(), "interrupted"), (RunError("gone"), "gone")]
)
def test_message_after_a_streamed_answer_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, end: BaseException, said: str
) -> None:
    """Ctrl-C left `smol: interrupted` at the end of the unfinished answer."""
    import pty

    class Ending(EchoBackend):
        def submit(
            self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
        ) -> Any:
            assert on_text is not None
            on_text("Once upon")
            raise end

    ours, theirs = pty.openpty()
    with (
        open(theirs, "w") as terminal,
        open(os.devnull) as nothing,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        with pytest.raises(SystemExit):
            app(["ask", "Hi"], obj=Ending)
    assert read_terminal(ours).endswith(f"Once upon\r\nsmol: {said}\r\n")


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == unwanted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

unwanted = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("start", ["script", "module"])
@pytest.mark.parametrize(
    ("imported", "args"),
    [
        ("smolcli.types", ["--help"]),
        ("smolcli.cli.main", ["--help"]),
        ("typer", ["ask", "--help"]),
        ("smolcli.cli.commands.ask", ["ask", "--help"]),
        ("smolcli.cli.commands.ask", ["--help"]),
    ],
)
def test_interrupted_start_exits_with_130(imported: str, args: list[str], start: str) -> None:
    """Ctrl-C during imports printed a traceback, and during the help "Aborted." with code 1."""
    script = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = script["smol"].split(":")
    run = {
        "script": f"from {module} import {function}; sys.exit({function}())",
        "module": "runpy.run_module('smolcli', run_name='__main__')",
    }[start]
    command = [sys.executable, "-c", INTERRUPTED_IMPORT + run, imported, *args]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "smol: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_interrupted_run_exits_with_130_and_can_be_resumed(
    tmp_path: Path, tiny_folder: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(
            f'{{"chat_id": "{n}", "user_prompt": "Hi {n}", "max_new_tokens": 256}}\n'
            for n in range(16)
        )
    )
    output = tmp_path / "in.results.jsonl"
    args = ["run", str(source), "--model", str(tiny_folder), "--max-batch-size", "1"]
    args += ["--threads", "1"]
    command = [sys.executable, "-m", "smolcli", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=REPOSITORY) as running:
        while running.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
    assert running.returncode == 130
    assert b"run the same command to resume" in said
    assert b"Traceback" not in said
    before = output.read_bytes()
    assert process(*args).returncode == 0
    assert output.read_bytes().startswith(before)
    assert output.read_bytes().count(b"\n") == 16


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
def test_closed_stdout_ends_the_run_quietly(queries: Path, tiny_folder: Path) -> None:
    queries.write_bytes(b"".join(b'{"chat_id": "%d"}\n' % number for number in range(20_000)))
    command = [sys.executable, "-m", "smolcli", "run", str(queries), "-o", "-", "--quiet"]
    with subprocess.Popen(
        [*command, "--model", str(tiny_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1


def test_stdin_to_a_file_cannot_be_resumed(tmp_path: Path, tiny_folder: Path) -> None:
    args = ("run", "-", "-o", tmp_path / "out", "--model", tiny_folder, "--max-new-tokens", 3)
    assert process(*args, input=GOOD).returncode == 0
    assert load_manifest(tmp_path / "out").input_sha256 is None
    done = process(*args, input=GOOD)
    assert done.returncode == 2
    assert b"a run from stdin cannot be resumed" in done.stderr
    assert process(*args, "--overwrite", input=GOOD + BAD).returncode == 3
