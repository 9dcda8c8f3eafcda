"""Errors about options say whether a flag, the environment or the config file set the value."""

import json
import os
from pathlib import Path

import pytest
from test_cli import smol

from smolcli.errors import QueryError, RunError, UsageError

CONCURRENCY = "the environment variable {} must be an integer of at least 1, not {!r}"
CONFLICT = ("--batch-dir", "batches", "--no-batches")  # so that no server starts


@pytest.mark.parametrize("value", ["many", "0", "1.5"])
@pytest.mark.parametrize("variable", ["HOSTING_MAX_CONCURRENCY", "SMOL_MAX_CONCURRENCY"])
def test_invalid_variable_is_named_with_its_value_and_what_is_allowed(
    variable: str, value: str
) -> None:
    """The error was about --max-concurrency and listed both variables."""
    done = smol("ask", "Hi", env={variable: value})
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"smol: {CONCURRENCY.format(variable, value)}\n"


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("SMOL_DTYPE", "fp8", "one of auto, float32, bfloat16, int8"),
        ("SMOL_SPECULATION", "perhaps", "true or false"),
        ("SMOL_TEMPERATURE", "hot", "a number"),
        ("SMOL_TOP_K", "1.5", "an integer"),
        ("SMOL_RETRY_FOR", "nan", "a number of at least 0"),
        ("SMOL_THREADS", "2000", "an integer from 0 to 1024"),
        ("SMOL_JSON", "maybe", "true or false"),
    ],
)
def test_every_kind_of_option_says_what_it_accepts(variable: str, value: str, allowed: str) -> None:
    done = smol("ask", "Hi", env={variable: value})
    assert done.exit_code == 2
    assert done.stderr == (
        f"smol: the environment variable {variable} must be {allowed}, not {value!r}\n"
    )


def test_invalid_flag_says_what_it_accepts() -> None:
    done = smol("ask", "Hi", "--threads", "two")
    assert done.exit_code == 2
    assert done.stderr == "smol: --threads must be an integer from 0 to 1024, not 'two'\n"


def test_commands_of_a_group_report_variables_as_well() -> None:
    done = smol("models", "list", env={"SMOL_JSON": "maybe"})
    assert (done.exit_code, done.stdout) == (2, "")
    assert "the environment variable SMOL_JSON must be true or false, not 'maybe'" in done.stderr


@pytest.mark.parametrize(
    ("args", "variable", "value"),
    [
        (("ask", "Hi"), "SMOL_TEMPERATURE", "-1"),
        (("ask", "Hi"), "SMOL_VIA", "foo"),
        (("ask", "Hi"), "SMOL_CHAT_TEMPLATE", "/missing/file"),
        (("ask", "Hi"), "SMOL_CONFIG", "/missing/file"),
        (("ask", "Hi"), "SMOL_MODEL", "/missing/file"),
        (("bench",), "SMOL_SIZES", "1,x"),
        (("serve",), "SMOL_CORS_ORIGIN", "example.org"),
    ],
)
def test_values_that_are_rejected_later_are_traced_to_their_variable(
    args: tuple[str, ...], variable: str, value: str
) -> None:
    done = smol(*args, backend=None, env={variable: value})
    assert done.exit_code in (1, 2)
    assert f"({variable}={value!r} in the environment)" in done.stderr


def test_values_that_are_rejected_later_are_traced_to_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("temperature = -1\n")
    done = smol("--config", path, "ask", "Hi")
    assert done.exit_code == 2
    assert f"(temperature='-1' in {path})" in done.stderr
    done = smol("--config", path, "ask", "Hi", "--temperature", "-2")
    assert str(path) not in done.stderr


def test_api_keys_are_not_shown() -> None:
    env = {"SMOL_UPSTREAM_API_KEY": "secret\x01", "SMOL_UPSTREAM": "http://127.0.0.1:9"}
    done = smol("serve", "--port", "0", backend=None, env=env)
    assert done.exit_code != 0
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("http://me:secret@host:x", "http://***@host:x"),
        ("http://me:secret/1@host", "http://***@host"),
        ("ftp://secret@host", "ftp://***@host"),
        ("me:secret@host", "***@host"),
        ("http://me:secret@[::1", "http://***@[::1"),
        ("http://me:secret@host?a=b", "http://***@host?a=b"),
        (f"http://me:{'secret' * 20}@host:x", "http://***@host:x"),
        ("http://a:secret@host http://a:secret@host", "http://***@host http://***@host"),
    ],
)
@pytest.mark.parametrize("place", ["variable", "config file"])
def test_passwords_in_urls_are_not_shown(
    value: str, shown: str, place: str, tmp_path: Path
) -> None:
    """Errors about a URL quoted it, and so did their notes."""
    path = tmp_path / "c.toml"
    path.write_text(f"via = {value.split()}\n" if place == "config file" else "")
    env = {"SMOL_VIA": value} if place == "variable" else {}
    done = smol("--config", path, "ask", "Hi", backend=None, env=env)
    assert done.exit_code == 2
    assert "secret" not in done.stderr
    if place == "variable":
        assert f"(SMOL_VIA={shown!r} in the environment)" in done.stderr
    else:
        assert f"(via={shown.split()} in {path})" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("ask", "Hi", "--model", "{}"),
        ("ask", "Hi", "--model", "{}.gguf"),
        ("ask", "Hi", "--schema", "{}"),
        ("ask", "Hi", "--chat-template", "{}"),
        ("run", "{}"),
        ("run", "in.jsonl", "--output", "{}"),
        ("run", "in.jsonl", "--errors", "{}"),
        ("run", "in.jsonl", "--prompt-file", "{}"),
        ("serve", "--api-key-file", "{}"),
        ("serve", "--cors-origin", "{}/"),
        ("serve", "--model", "{}"),
        ("report", "{}"),
        ("bench", "--json", "{}"),
        ("pull", "{}"),
        ("--config", "{}", "ask", "Hi"),
    ],
)
@pytest.mark.parametrize("url", ["ftp://me:secret@127.0.0.1:9/x", "s3x://key:secret@bucket/x"])
def test_passwords_in_urls_are_not_shown_for_any_option(
    args: tuple[str, ...], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only options for servers hid them."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"chat_id": "1", "user_prompt": "Hi"}\n')
    done = smol(*(arg.format(url) for arg in args), backend=None)
    assert done.exit_code in (1, 2)
    assert "***@" in done.stderr
    assert "secret" not in done.output


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/me/x@main/data.parquet",
        "http://host:8001/v1@2",
        "line 5: me@host",
        "/logs/12:30/me@host.jsonl",
        r"C:\\Users\\me@host\\in.jsonl",
    ],
)
def test_text_without_a_password_is_shown(text: str) -> None:
    assert str(UsageError(f"cannot read {text!r}")) == f"cannot read {text!r}"
    assert str(RunError(text)) == text


def test_errors_of_queries_quote_them_unchanged() -> None:
    assert str(QueryError("the id 'job:1@eu' was already used")).count("job:1@eu") == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SMOL_API_KEY", ""),
        ("SMOL_API_KEY", " "),
        ("SMOL_API_KEY_FILE", ""),
        ("SMOL_UPSTREAM", " "),
    ],
)
def test_repeatable_or_key_variable_must_not_be_blank(variable: str, value: str) -> None:
    """A blank SMOL_API_KEY started a server that was open to anyone."""
    done = smol("serve", *CONFLICT, env={variable: value})
    assert done.exit_code == 2
    assert f"the environment variable {variable} must not be blank" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("api-key = []", "--api-key must not be empty (api-key in {path})"),
        ('api-key = ""', "--api-key must not be empty (api-key in {path})"),
        ('api-key = []\napi-key-file = "keys"', "--batch-dir and --no-batches cannot be combined"),
        ("cors-origin = []", "--batch-dir and --no-batches cannot be combined"),
    ],
)
def test_empty_keys_in_the_config_file_do_not_open_the_server(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty list started a server that was open to anyone."""
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("key\n")
    path = tmp_path / "c.toml"
    path.write_text(f"[serve]\n{text}\n")
    done = smol("--config", path, "serve", *CONFLICT)
    assert (done.exit_code, done.stderr) == (2, f"smol: {said.format(path=path)}\n")


@pytest.mark.parametrize(
    "env",
    [
        {"SMOL_API_KEY": "", "SMOL_API_KEY_FILE": "keys"},
        {"SMOL_API_KEY": "key", "SMOL_API_KEY_FILE": ""},
        {"SMOL_UPSTREAM": "", "SMOL_CORS_ORIGIN": "", "SMOL_SERVED_MODEL_NAME": ""},
    ],
)
def test_empty_variable_means_unset_unless_it_opens_the_server(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("key\n")
    done = smol("serve", *CONFLICT, env=env)
    assert done.stderr == "smol: --batch-dir and --no-batches cannot be combined\n"


@pytest.mark.parametrize(
    "args",
    [
        ("ask", "--prompt-file", ""),
        ("run", "in.jsonl", "--errors", ""),
        ("run", "in.jsonl", "--system-file", ""),
        ("report", ""),
        ("report", "in.jsonl", "--png", ""),
        ("bench", "--peers", ""),
        ("bench", "--json", ""),
        ("serve", "--batch-dir", ""),
        ("serve", "--api-key-file", ""),
    ],
)
def test_empty_path_is_not_the_current_directory(args: tuple[str, ...]) -> None:
    """Errors were about the directory `.`, such as "--prompt-file .: Is a directory"."""
    done = smol(*args)
    name = next((arg for arg in args if arg.startswith("--")), "RESULTS")
    assert (done.exit_code, done.stderr) == (2, f"smol: {name} must be a path, not ''\n")


@pytest.mark.parametrize("command", [("report",), ("run", "--check")])
@pytest.mark.parametrize("is_folder", [False, True])
def test_path_without_permission_to_read_it_is_named(
    tmp_path: Path, command: tuple[str, ...], is_folder: bool
) -> None:
    """A file was said not to be a path, and a directory gave a traceback."""
    path = tmp_path / "secret.jsonl"
    path.mkdir() if is_folder else path.touch()
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    done = smol(*command, path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"cannot read {path}: " in done.stderr
    path.chmod(0o700)


def test_empty_path_in_the_config_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('prompt-file = ""\n')
    done = smol("--config", path, "ask", "Hi")
    assert (done.exit_code, done.stderr) == (
        2,
        f"smol: {path}: prompt-file must be a path, not ''\n",
    )


@pytest.mark.parametrize("flag", ["--chat-template", "--schema"])
def test_value_that_may_be_a_path_must_not_be_empty(flag: str) -> None:
    done = smol("ask", "Hi", flag, "")
    assert (done.exit_code, done.stderr) == (2, f"smol: {flag} must not be empty\n")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SMOL_MODLE", "SMOL_MODEL"),
        ("SMOL_MAX_TOKENS", "SMOL_MAX_NEW_TOKENS"),
        ("SMOL_CONFIG_FILE", "SMOL_CONFIG"),
        ("SMOL_HOMES", "SMOL_HOME"),
        ("smol_api_keys", "SMOL_API_KEY"),
        ("SMOL_PORT", None),  # of another command
        ("SMOL_SERVICE_HOST", None),  # of a Kubernetes service
        ("SMOL_PORT_8000_TCP_ADDR", None),
        ("SMOL_URL", None),
        ("SMOL_KERNEL_VARIANT", None),
    ],
)
def test_misspelled_variable_is_reported(variable: str, meant: str | None) -> None:
    """It was ignored without a word, unlike a misspelled flag or key of the config file."""
    done = smol("models", "list", "--json", env={variable: "1"})
    json.loads(done.stdout)
    assert ("no effect" in done.stderr) == (meant is not None)
    if meant:
        note = f"smol: {variable} in the environment has no effect; did you mean {meant}?\n"
        assert done.stderr.startswith(note)
