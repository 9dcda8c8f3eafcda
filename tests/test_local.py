"""The local backend on a tiny random model: text, stop strings, cancellation, failures."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolcli.backends.local import LocalBackend, open_local
from smolcli.engine.engine import Engine
from smolcli.engine.native.model import NativeModel
from smolcli.engine.torch_ops.model import TorchModel
from smolcli.errors import BackendError, UsageError
from smolcli.settings import EngineSettings
from smolcli.text.detokenizer import Detokenizer
from smolcli.types import ErrorCode, FinishReason, Message, Query, Sampling

WAIT_S = 120


@pytest.fixture(scope="module")
def settings(tiny_folder: Path) -> EngineSettings:
    return EngineSettings(model=str(tiny_folder), dtype="float32", max_batch_size=4, kv_cache_mb=64)


@pytest.fixture
def backend(settings: EngineSettings) -> Iterator[LocalBackend]:
    with closing(open_local(settings)) as backend:
        yield backend


def query(text: str = "Why is the sky blue?", **changes: Any) -> Query:
    sampling = Sampling(max_new_tokens=changes.pop("max_new_tokens", 24))
    return replace(Query("q", (Message("user", text),), sampling), **changes)


def answer(backend: LocalBackend, query: Query) -> Any:
    return backend.submit(query).result(WAIT_S)


def test_a_result_has_text_usage_finish_reason_and_timings(backend: LocalBackend) -> None:
    result = answer(backend, query(line=3, metadata={"a": 1}))
    assert (result.chat_id, result.line, result.metadata) == ("q", 3, {"a": 1})
    assert result.usage.completion_tokens <= 24
    assert result.response == result.response.strip()
    assert result.finish_reason in FinishReason
    assert 0 <= result.timings.queue_s <= result.timings.first_token_s <= result.timings.total_s


def test_no_query_hangs_when_the_device_is_lost(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing memory on a lost device fails too."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TorchModel, "forward", fail)
    monkeypatch.setattr(NativeModel, "forward", fail)
    monkeypatch.setattr(Engine, "stop", fail)
    futures = [backend.submit(query(str(n))) for n in range(12)]
    done, waiting = wait(futures, WAIT_S)
    assert not waiting
    assert all(future.exception() or future.result().is_error for future in done)


@pytest.mark.parametrize(("megabytes", "hits"), [(1, True), (0, False)])
def test_the_prefix_cache_can_be_switched_off(
    settings: EngineSettings, megabytes: int, hits: bool
) -> None:
    with closing(open_local(replace(settings, prefix_cache_mb=megabytes))) as backend:
        answer(backend, query("Why is the sky blue?"))
        answer(backend, query("Why is the sky grey?"))
        assert bool(backend.counters().cached_tokens) is hits


def test_streamed_text_adds_up_to_the_response(backend: LocalBackend) -> None:
    pieces: list[str] = []
    result = backend.submit(query(), pieces.append).result(WAIT_S)
    assert len(pieces) > 1
    assert "".join(pieces) == result.response


def test_a_stop_string_ends_the_response_and_is_excluded(backend: LocalBackend) -> None:
    whole = answer(backend, query()).response
    stop = whole[len(whole) // 2 :][:3]
    result = answer(backend, query(stop=(stop,)))
    assert result.response == whole[: whole.find(stop)].strip()
    assert result.finish_reason == FinishReason.STOP


def test_speculation_changes_no_piece_of_an_answer(settings: EngineSettings) -> None:
    """Stop strings, log probabilities and streamed pieces come from single tokens, as without."""
    whole = query("one one one two two two", max_new_tokens=120)
    seen: list[list[Any]] = []
    for speculation in (False, True):
        pieces: list[Any] = []
        with closing(open_local(replace(settings, speculation=speculation))) as backend:
            text = backend.submit(replace(whole, top_logprobs=2), pieces.append).result(WAIT_S)
            assert text.response is not None
            stop = text.response[len(text.response) // 2 :][:2]
            stopped = answer(backend, replace(whole, stop=(stop,)))
            several = answer(backend, replace(whole, n=3))
            results = [each.record() for each in (text, stopped, several)]
            counters = backend.counters()
        seen.append([results, pieces, counters.generated_tokens])
        assert (counters.accepted_tokens > 0) == (counters.drafted_tokens > 0) == speculation
    assert seen[0] == seen[1]


def test_many_threads_can_submit(backend: LocalBackend) -> None:
    """The same query gets the same answer from every thread and in any batch."""
    questions = [query(f"Question {i % 5}?", chat_id=str(i)) for i in range(20)]
    expected = [answer(backend, q).response for q in questions[:5]]
    futures = [None] * 20

    def ask(i: int) -> None:
        futures[i] = backend.submit(questions[i])  # type: ignore[call-overload]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f.result(WAIT_S).response for f in futures] == expected * 4  # type: ignore[attr-defined]


def cancel_after_the_first_piece(backend: LocalBackend, query: Query) -> None:
    """Cancel a query while its answer is being generated; the engine waits for that."""
    started, cancelled = threading.Event(), threading.Event()

    def wait_for_cancellation(_: str) -> None:
        started.set()
        cancelled.wait(WAIT_S)

    future = backend.submit(query, wait_for_cancellation)
    assert started.wait(WAIT_S)
    assert future.cancel()
    cancelled.set()


def test_cancelling_frees_the_slot(backend: LocalBackend) -> None:
    cancel_after_the_first_piece(backend, query(max_new_tokens=400))
    answer(backend, query())
    health = backend.health()
    assert (health.is_alive, health.num_running, health.num_waiting) == (True, 0, 0)


def test_tokens_of_cancelled_queries_are_counted(backend: LocalBackend) -> None:
    first = answer(backend, query()).usage
    counters = backend.counters()
    assert counters.prompt_tokens == first.prompt_tokens
    assert counters.generated_tokens == first.completion_tokens
    cancel_after_the_first_piece(backend, query(max_new_tokens=400))
    second = answer(backend, query()).usage
    cancelled = backend.counters().generated_tokens - 2 * second.completion_tokens
    assert 1 <= cancelled < 400


def test_a_prompt_that_does_not_fit_is_the_error_of_its_query(backend: LocalBackend) -> None:
    result = answer(backend, query("word " * 2000))
    assert result.error_code == ErrorCode.PROMPT_TOO_LONG
    assert "maximum context length is 512 tokens" in result.error
    assert not answer(backend, query()).is_error


def test_a_failing_callback_affects_its_own_query_only(settings: EngineSettings) -> None:
    def broken(_: str) -> None:
        raise ValueError("callback\nfailed")

    with closing(open_local(settings)) as backend:
        bad, good = backend.submit(query(), broken), backend.submit(query())
        assert good.result(WAIT_S).error is None
        result = bad.result(WAIT_S)
    assert result.error_code == ErrorCode.INTERNAL
    assert result.error == "internal error: ValueError: callback"


def test_closing_completes_every_future(settings: EngineSettings) -> None:
    backend = open_local(settings)
    futures = [backend.submit(query(max_new_tokens=400)) for _ in range(12)]
    backend.close()
    done, pending = wait(futures, timeout=WAIT_S)
    assert not pending
    assert any(isinstance(f.exception(), BackendError) for f in done)
    with pytest.raises(BackendError, match="shut down"):
        backend.submit(query()).result(WAIT_S)


def test_any_concurrency_can_be_allowed(settings: EngineSettings) -> None:
    """It started as many threads, which fails long before a million."""
    with closing(open_local(replace(settings, max_concurrency=10**6))) as backend:
        assert not backend.submit(query()).result(WAIT_S).is_error


def test_queries_need_no_new_threads(
    backend: LocalBackend, settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of threads was once reported as "the model is shut down", and ended a run."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    futures = [backend.submit(query(str(n))) for n in range(16)]
    assert not any(future.result(WAIT_S).is_error for future in futures)
    with pytest.raises(BackendError, match="can't start new thread; raise the limit"):
        open_local(settings)


def test_a_broken_engine_fails_every_query(settings: EngineSettings) -> None:
    backend = open_local(settings)
    backend._engine.model = None  # type: ignore[assignment]
    futures = [backend.submit(query()) for _ in range(8)]
    for future in futures:
        error = future.exception(WAIT_S)
        assert isinstance(error, BackendError) if error else future.result().is_error
    backend.close()


def test_the_identity_names_model_dtype_and_revision(
    backend: LocalBackend, tiny_folder: Path
) -> None:
    identity = backend.identity()
    assert identity["model"] == str(tiny_folder)
    assert identity["dtype"] == "float32"
    assert len(identity["revision"]) == 64
    assert identity["kernel_variant"].endswith("-float32")


def test_the_cpu_path_imports_neither_torch_nor_transformers(settings: EngineSettings) -> None:
    code = (
        "import sys; from smolcli.backends.local import open_local\n"
        "from smolcli.engine.autoconfig import resolve_dtype\n"
        "from smolcli.settings import EngineSettings\n"
        "from smolcli.types import Message, Query, Sampling\n"
        f"settings = {settings!r}\n"
        "backend = open_local(settings)\n"
        "query = Query('q', (Message('user', 'Hi'),), Sampling(4, temperature=0.8))\n"
        "assert not backend.submit(query).result().is_error\n"
        "assert backend.identity()['dtype'] == resolve_dtype(settings)\n"
        "backend.close()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unavailable_device_is_a_usage_error(settings: EngineSettings) -> None:
    with pytest.raises(UsageError, match="device 'cuda:99' is not available"):
        open_local(replace(settings, device="cuda:99"))


@given(
    st.text(alphabet="ab \n", max_size=30),
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=3), max_size=3),
    st.data(),
)
def test_streamed_text_ends_before_the_first_stop_string(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    watched = Detokenizer(Script(pieces), tuple(stops))  # type: ignore[arg-type]
    shown, so_far = "", ""
    for index, piece in enumerate(pieces):
        so_far += piece
        shown += watched.push(index)
        assert watched.is_stopped == any(stop in so_far for stop in stops)
        if watched.is_stopped:
            break
    shown += watched.finish()
    cut = min([at for stop in stops if (at := so_far.find(stop)) >= 0], default=len(text))
    assert shown == watched.text == text[:cut].strip()


class Script:
    """A decoder whose tokens are the given pieces of text."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""
