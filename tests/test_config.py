"""The config file, which the environment and flags override."""

import sys
from pathlib import Path

import pytest
from test_cli import Seen, smol

from smolcli.batch.manifest import load_manifest

FILE = """\
max-new-tokens = 7
threads = 2
[ask]
top-k = 5
temperature = 0.5
[serve]
port = 9000
api-key = ["first", "second"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(FILE)
    return path


def seen_by_backend(*args: object, **options: object) -> Seen:
    """The settings and query that a backend receives from `smol ... ask Hi`."""
    seen, open_backend = Seen.opener()
    done = smol(*args, backend=open_backend, **options)
    assert done.exit_code == 0, done.stderr
    return seen


@pytest.mark.parametrize(
    ("flags", "variables", "tokens"),
    [
        (["--max-new-tokens", 9], {"SMOL_MAX_NEW_TOKENS": "8"}, 9),
        ([], {"SMOL_MAX_NEW_TOKENS": "8"}, 8),
        ([], {}, 7),
    ],
)
def test_flags_override_the_environment_which_overrides_the_file(
    config: Path, flags: list[object], variables: dict[str, str], tokens: int
) -> None:
    seen = seen_by_backend("--config", config, "ask", "Hi", *flags, env=variables)
    assert seen.queries_seen[0].sampling.max_new_tokens == tokens
    assert seen.settings_seen.threads == 2


def test_a_table_applies_to_its_command_only(config: Path) -> None:
    asking = seen_by_backend("--config", config, "ask", "Hi").queries_seen[0].sampling
    assert (asking.top_k, asking.temperature) == (5, 0.5)
    talking = seen_by_backend("--config", config, "chat", input="Hi\n").queries_seen[0].sampling
    assert (talking.top_k, talking.max_new_tokens) == (0, 7)


def test_a_flag_of_the_file_can_be_turned_off(tmp_path: Path) -> None:
    path, queries = tmp_path / "c.toml", tmp_path / "in.jsonl"
    path.write_text("dedupe = false\ntimings = true\n")
    queries.write_text('{"chat_id": 1, "user_prompt": "Hi"}\n{"chat_id": 2, "user_prompt": "Hi"}\n')
    assert smol("--config", path, "run", queries).exit_code == 0
    output = tmp_path / "in.results.jsonl"
    report = load_manifest(output).statistics
    assert report is not None
    assert report["model_calls"] == 2
    assert "timings" in output.read_text()


def test_top_level_key_does_not_apply_to_an_option_with_another_meaning(tmp_path: Path) -> None:
    """`json = true` made `smol bench` write its measurements to a file named True."""
    path = tmp_path / "c.toml"
    path.write_text('json = true\nprompt-file = "template"\n')
    assert seen_by_backend("--config", path, "ask", "Hi").queries_seen
    path.write_text('[bench]\njson = "out.json"\nsizes = "x"\n')
    assert "--sizes must be" in smol("--config", path, "bench").stderr


def test_environment_variable_names_the_file(config: Path) -> None:
    seen = seen_by_backend("ask", "Hi", env={"SMOL_CONFIG": str(config)})
    assert seen.settings_seen.threads == 2


@pytest.mark.skipif(sys.platform != "linux", reason="where Linux keeps settings")
def test_file_in_the_users_config_directory_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "settings" / "smol"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("threads = 3\n")
    own = {"XDG_CONFIG_HOME": str(tmp_path / "settings")}
    assert seen_by_backend("ask", "Hi", env=own).settings_seen.threads == 3
    assert seen_by_backend("--config", "/dev/null", "ask", "Hi", env=own).settings_seen.threads == 0
    out_of_reach = {"XDG_CONFIG_HOME": str(tmp_path / ("x" * 300))}  # as another user's home is
    assert seen_by_backend("ask", "Hi", env=out_of_reach).settings_seen.threads == 0


def test_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_text("threads = 3\n", "utf-8-sig")
    assert seen_by_backend("--config", path, "ask", "Hi").settings_seen.threads == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_new_tokens = 3", "unknown option 'max_new_tokens'; did you mean 'max-new-tokens'?"),
        ("[serv]\nport = 3", "unknown command 'serv'; did you mean 'serve'?"),
        ("[ask]\nport = 3", "smol ask has no option 'port'"),
        ("help = true", "unknown option 'help'"),
        ('threads = "two"', "threads must be an integer from 0 to 1024, not 'two'"),
        ("top-k = 1.5", "top-k must be an integer, not '1.5'"),
        ("max-batch-size = -1", "max-batch-size must be an integer of at least 0, not '-1'"),
        ('dtype = "float16"', "dtype must be one of auto, float32, bfloat16, int8, not 'float16'"),
        ('dedupe = "perhaps"', "dedupe must be true or false, not 'perhaps'"),
        ('schema = "a\\u0000b"', "schema must not contain a null character"),
        ('via = ["http://a", "\\u0000"]', "via must not contain a null character"),
        ('model = ["a", "b"]', "model takes one value, not a list"),
        ("model = []", "model takes one value, not a list"),
        ("[ask]\nmodel = {}", "model takes text or a number, not a table or a nested list"),
        ('via = [["a"]]', "via takes text or a number, not a table or a nested list"),
        ('[serve]\napi-key = {a = "b"}', "api-key takes text or a number, not a table"),
        ("threads = x", "is not valid TOML: Invalid value (at line 1, column 11)"),
        ("\udcff", "is not valid TOML"),
        (None, "cannot read the config file"),
    ],
)
def test_errors_in_a_file_are_explained(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    done = smol("--config", path, "ask", "Hi")
    assert (done.exit_code, done.stdout) == (2, "")
    assert str(path) in done.stderr
    assert said in done.stderr
