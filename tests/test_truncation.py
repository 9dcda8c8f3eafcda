"""--truncate-prompt, with the tokenizer of a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import EchoBackend
from run_tools import answer, results
from typer.testing import CliRunner

from smolcli.batch.manifest import load_manifest
from smolcli.batch.truncation import MARK, PromptTruncation
from smolcli.cli.main import app
from smolcli.data.rows import Row
from smolcli.errors import ResumeError, UsageError
from smolcli.settings import EngineSettings, QueryDefaults, RowSettings, RunSettings
from smolcli.text.tokenizer import ChatTokenizer, context_length
from smolcli.types import Message, Query, Sampling

LONG = " ".join(f"word{number}" for number in range(2000))


def query(*messages: Message, max_new_tokens: int = 16) -> Query:
    return Query("1", messages, Sampling(max_new_tokens=max_new_tokens))


def num_tokens(folder: Path, fitted: Query) -> int:
    return len(ChatTokenizer.load(folder).encode_query(fitted))


def job(folder: Path, tmp_path: Path, **options: Any) -> RunSettings:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": LONG}) + '\n{"text": "short"}\n')
    sampling = Sampling(max_new_tokens=16)
    return RunSettings(
        source,
        tmp_path / "out.jsonl",
        QueryDefaults(sampling),
        EngineSettings(model=str(folder)),
        seed=1,
        rows=RowSettings("First: {text} Last.", truncate_prompt=True),
        **options,
    )


@pytest.mark.parametrize("max_new_tokens", [1, 16, 10**6])
def test_longest_message_is_cut_in_the_middle(tiny_folder: Path, max_new_tokens: int) -> None:
    """The answer gets the room that it asks for, but at most half of the context window."""
    messages = (Message("system", "Be brief."), Message("user", LONG), Message("user", "Why?"))
    fitted = PromptTruncation(EngineSettings(str(tiny_folder))).fit(
        query(*messages, max_new_tokens=max_new_tokens), Row(1)
    )
    head, _, tail = fitted.messages[1].content.partition(MARK)
    assert LONG.startswith(head)
    assert LONG.endswith(tail)
    assert abs(len(head) - len(tail)) <= 1
    assert fitted.metadata == {"characters_cut": len(LONG) - len(head) - len(tail)}
    assert [fitted.messages[0], fitted.messages[2]] == [messages[0], messages[2]]
    longest = context_length(tiny_folder)
    limit = max(longest - max_new_tokens, longest // 2)
    assert limit - 8 <= num_tokens(tiny_folder, fitted) <= limit


def test_prompt_that_fits_is_not_touched(tiny_folder: Path) -> None:
    short = query(Message("user", "Hi"))
    assert PromptTruncation(EngineSettings(str(tiny_folder))).fit(short, Row(1)) is short


def test_prompt_that_is_too_long_without_its_longest_message_stays(tiny_folder: Path) -> None:
    long = query(Message("user", LONG), Message("user", LONG + LONG))
    assert PromptTruncation(EngineSettings(str(tiny_folder))).fit(long, Row(1)) is long


def test_raw_prompt_is_cut(tiny_folder: Path) -> None:
    raw = replace(query(), raw_prompt=LONG)
    fitted = PromptTruncation(EngineSettings(str(tiny_folder))).fit(raw, Row(1))
    assert isinstance(fitted.raw_prompt, str)
    assert MARK in fitted.raw_prompt
    assert num_tokens(tiny_folder, fitted) <= context_length(tiny_folder) - 16


def test_template_around_the_longest_column_stays(tiny_folder: Path, tmp_path: Path) -> None:
    settings = job(tiny_folder, tmp_path)
    statistics = answer(settings)
    long, short = results(settings.output)
    assert long["response"].startswith("First: word0 ")
    assert f"{MARK.strip()} " in long["response"]
    assert "word1999 Last. (" in long["response"]
    assert long["metadata"]["characters_cut"] > 0
    assert "metadata" not in short
    assert statistics.truncated_prompts == 1
    assert ("truncated prompts", "1") in statistics.rows()
    manifest = load_manifest(settings.output)
    assert manifest.generation["truncate_prompt"] is True
    assert (manifest.statistics or {})["truncated_prompts"] == 1


def test_truncation_is_counted_over_sessions_and_cannot_change(
    tiny_folder: Path, tmp_path: Path
) -> None:
    settings = job(tiny_folder, tmp_path)
    answer(replace(settings, limit=1))
    assert answer(settings).truncated_prompts == 1
    with pytest.raises(ResumeError, match="truncate_prompt was true, is null"):
        answer(replace(settings, rows=RowSettings("First: {text} Last.")))


def test_check_truncates_as_the_run_does(tiny_folder: Path, tmp_path: Path) -> None:
    source = job(tiny_folder, tmp_path).input
    args = ["run", str(source), "--check", "--prompt", "{text}", "--model", str(tiny_folder)]
    assert CliRunner().invoke(app, args, obj=EchoBackend).exit_code == 3
    assert CliRunner().invoke(app, [*args, "--truncate-prompt"], obj=EchoBackend).exit_code == 0


def test_truncation_needs_a_tokenizer(tmp_path: Path) -> None:
    unknown = PromptTruncation(EngineSettings("someone/unknown"))
    with pytest.raises(UsageError, match="run smol pull someone/unknown first"):
        unknown.fit(query(Message("user", LONG)), Row(1))
    args = ["run", "in.jsonl", "--truncate-prompt", "--via", "http://127.0.0.1:9"]
    done = CliRunner().invoke(app, args)
    assert (done.exit_code, "cannot be combined with --via" in done.stderr) == (2, True)
