"""The Python API: prompts, conversations, streams and files on one backend."""

import doctest
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_tools import serving, tiny_engine

import smolcli
from smolcli import LLM, ErrorCode, Message, ModelError, QueryError, SmolError
from smolcli import llm as llm_module
from smolcli.backends.local import open_local

CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, dtype="float32", threads=1) as llm:
        yield llm


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, smolcli; from smolcli import LLM\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_every_exported_name_exists() -> None:
    assert all(hasattr(smolcli, name) for name in smolcli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        smolcli.Model  # noqa: B018
    assert (Path(smolcli.__file__).parent / "py.typed").is_file()


def test_one_prompt_gives_one_result_and_a_list_a_list(model: LLM) -> None:
    single = model.chat("Hi", max_new_tokens=5)
    conversation = model.chat(CONVERSATION, max_new_tokens=5)
    both = model.chat(["Hi", CONVERSATION], max_new_tokens=5)
    messages = model.chat(
        [Message(m["role"], m["content"]) for m in CONVERSATION], max_new_tokens=5
    )
    assert single.usage is not None
    assert single.usage.completion_tokens <= 5
    assert [result.response for result in both] == [single.response, conversation.response]
    assert messages.response == conversation.response
    none: list[str] = []
    assert model.chat(none) == []


def test_an_invalid_prompt_is_a_result_and_an_invalid_option_an_error(model: LLM) -> None:
    good, blank = model.chat(["Hi", " "], max_new_tokens=3)
    assert not good.is_error
    assert (blank.error_code, blank.field) == (ErrorCode.MISSING_FIELD, "user_prompt")
    long = model.chat("word " * 5000)
    assert long.error_code is ErrorCode.PROMPT_TOO_LONG
    with pytest.raises(QueryError, match="temperature must be"):
        model.chat("Hi", temperature=-1)
    with pytest.raises(QueryError, match="unknown field 'temprature'"):
        model.chat("Hi", temprature=1)  # type: ignore[call-overload]


def test_texts_and_token_ids_are_continued_and_scored(model: LLM) -> None:
    single = model.complete("Rome is", max_new_tokens=4)
    scored = model.complete("Rome is", max_new_tokens=0, prompt_logprobs=1)
    assert scored.prompt_logprobs is not None
    ids = [token["token_id"] for token in scored.prompt_logprobs]
    assert model.complete(ids, max_new_tokens=4).response == single.response
    several = model.complete([ids, [1]], max_new_tokens=4)
    assert several[0].response == single.response
    assert model.complete(["Rome is", ""], max_new_tokens=4)[1].field == "raw_prompt"


def test_a_seed_makes_sampling_reproducible(model: LLM) -> None:
    def sample(seed: int | None) -> list[str | None]:
        results = model.chat(["Hi"] * 3, temperature=2.0, max_new_tokens=9, seed=seed)
        return [result.response for result in results]

    assert sample(1) == sample(1)
    assert len({*sample(1)}) == 3
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_a_stream_yields_the_answer(model: LLM) -> None:
    pieces = list(model.stream("Hi", max_new_tokens=9))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == model.chat("Hi", max_new_tokens=9).response
    stream = model.stream("Hi", max_new_tokens=400, repetition_penalty=1.3)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(QueryError) as caught:
        list(model.stream("word " * 5000))
    assert caught.value.code is ErrorCode.PROMPT_TOO_LONG
    with pytest.raises(QueryError, match="cannot be empty"):
        model.stream(" ")


def test_a_schema_constrains_the_answer(model: LLM) -> None:
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    assert str(model.chat("Hi", schema=digit).response).isdecimal()
    assert str(model.chat("Hi", schema=bool).response) in ("true", "false")
    assert model.chat("Hi", schema=digit, choices=["a", "b"]).response in ("a", "b")


def test_run_answers_a_file_like_the_command(model: LLM, tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"chat_id": "1", "user_prompt": "Hi"}\n{"chat_id": "2"}\n', "utf-8")
    statistics = model.run(path, max_new_tokens=5)
    assert (statistics.num_answered, statistics.failed) == (1, {"missing_field": 1})
    lines = (tmp_path / "queries.results.jsonl").read_text("utf-8").splitlines()
    expected = model.chat("Hi", max_new_tokens=5).response
    assert json.loads(lines[0])["response"] == expected
    table = tmp_path / "in.csv"
    table.write_text("review\nHi\n", "utf-8")
    model.run(table, tmp_path / "out.csv", prompt="{review}", max_new_tokens=5)
    assert (tmp_path / "out.csv").read_text("utf-8").count("\n") >= 2
    with pytest.raises(QueryError, match="stop must be set by each query"):
        model.run(path, stop="x")


def test_via_a_server_answers_are_the_same(model: LLM, tiny_folder: Path) -> None:
    expected = model.chat("Hi", max_new_tokens=5).response
    with serving(open_local, tiny_engine(tiny_folder)) as server, LLM(via=server.url) as remote:
        assert remote.chat("Hi", max_new_tokens=5).response == expected


def test_a_missing_model_is_a_smol_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        LLM(tmp_path / "missing.gguf")
    assert isinstance(caught.value, SmolError)


@pytest.mark.model
@pytest.mark.usefixtures("model_folder")
def test_examples_in_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"chat_id": str(n), "user_prompt": f"Hi {n}"}) for n in range(2)]
    Path("queries.jsonl").write_text("\n".join(lines), "utf-8")
    num_examples = 0
    with LLM() as llm:
        for test in doctest.DocTestFinder().find(llm_module, globs={"llm": llm}):
            result = doctest.DocTestRunner().run(test)
            assert result.failed == 0, test.name
            num_examples += result.attempted
    assert num_examples >= 8
