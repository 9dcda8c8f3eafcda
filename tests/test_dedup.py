"""Equal queries are generated once, and each receives its own result."""

from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import pytest
from fakes import EchoBackend, HeldBackend, echo

from smolcli.backends.base import AnswerSource, OnText, PendingQuery
from smolcli.backends.dedup import MAX_CACHED, DedupBackend
from smolcli.backends.ray.work_queue import ClusterQuery
from smolcli.backends.remote.dispatch import RemoteQuery
from smolcli.errors import BackendError
from smolcli.types import ErrorCode, Message, Query, Result, Sampling, TextPiece, Usage, failure

QUERY = Query("1", (Message("user", "What is gravity?"),), line=1)
SAME = replace(QUERY, chat_id="2", line=7, metadata={"row": 2}, sampling=Sampling(seed=3))


class StreamingBackend(HeldBackend):
    """A `HeldBackend` that exposes the text callbacks of its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.on_texts: list[OnText | None] = []

    def submit(self, query: Query, on_text: OnText | None = None, **options: Any) -> Future[Result]:
        self.on_texts.append(on_text)
        return super().submit(query, on_text, **options)


def test_equal_queries_in_flight_are_generated_once() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    first, second = backend.submit(QUERY), backend.submit(SAME)
    assert len(held.futures) == 1
    answer = replace(echo(QUERY), usage=Usage(9, 3, cached_tokens=4))
    held.futures[0].set_result(answer)
    assert first.result() == answer
    other = second.result()
    assert other.usage is not None
    assert other.usage.cached_tokens == 9, "nothing of its prompt was computed"
    assert (other.chat_id, other.line, other.metadata) == ("2", 7, {"row": 2})
    assert (other.response, other.usage) == (answer.response, answer.usage)
    assert (first.result().is_deduplicated, other.is_deduplicated) == (False, True)
    assert backend.counters().shared_queries == 1


def test_a_cached_answer_is_returned_at_once() -> None:
    backend = DedupBackend(inner := EchoBackend())
    pieces: list[str] = []
    backend.submit(QUERY)
    later = backend.submit(SAME, pieces.append, is_interactive=True).result()
    assert inner.model_calls == 1
    assert "".join(pieces) == later.response == echo(QUERY).response


@pytest.mark.parametrize(
    "changes",
    [
        {"include_stop": True},
        {"bad_words": ("spam",)},
        {"sampling": Sampling(presence_penalty=0.5)},
        {"sampling": Sampling(logit_bias=((3, 1.0),))},
        {"sampling": Sampling(min_tokens=3)},
        {"sampling": Sampling(ignore_eos=True)},
        {"sampling": Sampling(stop_token_ids=(3,))},
    ],
    ids=str,
)
def test_queries_that_differ_in_a_setting_are_not_shared(changes: dict[str, Any]) -> None:
    backend = DedupBackend(held := HeldBackend())
    backend.submit(QUERY)
    backend.submit(replace(QUERY, **changes))
    assert len(held.futures) == 2


def test_a_query_that_joins_gets_the_log_probabilities_so_far() -> None:
    backend = DedupBackend(held := StreamingBackend())
    asked = replace(QUERY, top_logprobs=0)
    first: list[str] = []
    second: list[str] = []
    backend.submit(asked, first.append)
    on_text = held.on_texts[0]
    assert on_text is not None
    on_text(TextPiece("A ", [{"token": "A"}]))
    on_text(TextPiece("force", [{"token": "fo"}, {"token": "rce"}]))
    backend.submit(replace(asked, chat_id="2"), second.append)
    assert first == ["A ", "force"]
    assert second == ["A force"]
    assert isinstance(second[0], TextPiece)
    assert [entry["token"] for entry in second[0].logprobs] == ["A", "fo", "rce"]


def test_a_change_of_model_clears_the_cache() -> None:
    """A gateway's upstream may come back with another model."""
    backend = DedupBackend(inner := EchoBackend())
    backend.submit(QUERY).result()
    inner.settings = replace(inner.settings, model="another")
    backend.submit(SAME).result()
    assert inner.model_calls == 2
    backend.submit(SAME).result()
    assert inner.model_calls == 2


class SourcedBackend(HeldBackend):
    """A `HeldBackend` whose answers come from the `source` that the test sets."""

    source: AnswerSource | None = None

    def answer_source(self) -> AnswerSource | None:
        return self.source


def test_nothing_is_shared_while_the_model_is_unknown() -> None:
    """A server that ignores settings and samples once gave one answer to everybody, forever."""
    backend = DedupBackend(held := SourcedBackend())
    first, second = backend.submit(QUERY), backend.submit(SAME)
    held.futures[0].set_result(echo(QUERY))
    assert len(held.futures) == 2
    assert first.done()
    assert not second.done()
    assert backend.counters().shared_queries == 0


def test_a_model_known_by_name_only_shares_greedy_answers_in_flight() -> None:
    backend = DedupBackend(held := SourcedBackend())
    held.source = AnswerSource("name", is_verified=False)
    backend.submit(QUERY)
    backend.submit(SAME)
    assert len(held.futures) == 1
    held.futures[0].set_result(echo(QUERY))
    backend.submit(SAME)
    assert len(held.futures) == 2, "its answers are not cached"
    sampled = replace(QUERY, sampling=Sampling(temperature=1.0, seed=4))
    for _ in range(2):
        backend.submit(sampled)
    assert len(held.futures) == 4, "it may ignore the seed"


def test_answers_of_a_model_that_may_change_unnoticed_are_shared_in_flight_only() -> None:
    """A gateway gave cached answers of a server replaced since its last health check."""
    backend = DedupBackend(held := SourcedBackend())
    held.source = AnswerSource("model", is_verified=True, is_fixed=False)
    backend.submit(QUERY)
    backend.submit(SAME)
    assert len(held.futures) == 1
    held.futures[0].set_result(echo(QUERY))
    backend.submit(SAME)
    assert len(held.futures) == 2


def test_an_answer_is_not_cached_if_the_model_changed_meanwhile() -> None:
    backend = DedupBackend(held := SourcedBackend())
    held.source = AnswerSource("first", is_verified=True)
    backend.submit(QUERY)
    held.source = AnswerSource("second", is_verified=True)
    held.futures[0].set_result(echo(QUERY))
    backend.submit(SAME)
    assert len(held.futures) == 2


@pytest.mark.parametrize(
    "other",
    [
        replace(QUERY, messages=(Message("user", "What is gravity"),)),
        replace(QUERY, stop=(".",)),
        replace(QUERY, sampling=Sampling(max_new_tokens=5)),
        replace(QUERY, sampling=Sampling(temperature=1.0, seed=4)),
    ],
)
def test_different_queries_are_not_shared(other: Query) -> None:
    backend = DedupBackend(inner := EchoBackend())
    backend.submit(QUERY)
    backend.submit(other)
    assert inner.model_calls == 2


def test_sampled_answers_are_shared_between_equal_seeds_only() -> None:
    backend = DedupBackend(inner := EchoBackend())
    sampled = replace(QUERY, sampling=Sampling(temperature=1.0, seed=4))
    for query in (
        sampled,
        replace(sampled, chat_id="2"),
        replace(sampled, sampling=Sampling(seed=5)),
    ):
        backend.submit(query)
    assert inner.model_calls == 2


def test_a_generation_is_cancelled_with_its_last_waiter() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    first, second = backend.submit(QUERY), backend.submit(SAME)
    first.cancel()
    assert not held.futures[0].cancelled()
    second.cancel()
    assert held.futures[0].cancelled()
    backend.submit(QUERY)
    assert len(held.futures) == 2, "a query after the cancellation starts a new generation"


def test_a_generation_is_cancelled_with_its_last_waiter_after_a_change_of_model() -> None:
    """Clients of a gateway could cancel nothing that was in flight when an upstream failed."""
    backend = DedupBackend(held := SourcedBackend())
    held.source = AnswerSource("first", is_verified=True)
    before = backend.submit(QUERY)
    held.source = AnswerSource("second", is_verified=True)
    after = backend.submit(SAME)
    before.cancel()
    assert [future.cancelled() for future in held.futures] == [True, False]
    after.cancel()
    assert held.futures[1].cancelled()


def test_joining_a_stream_delivers_its_text_so_far() -> None:
    held = StreamingBackend()
    backend = DedupBackend(held)
    first: list[str] = []
    second: list[str] = []
    backend.submit(QUERY, first.append)
    emit = held.on_texts[0]
    assert emit is not None
    emit("It is")
    backend.submit(SAME, second.append)
    emit(" a force.")
    assert (first, second) == (["It is", " a force."], ["It is", " a force."])
    assert len(held.futures) == 1


def test_an_interactive_query_does_not_join_batch_work() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    backend.submit(QUERY)
    backend.submit(SAME, is_interactive=True)
    assert len(held.futures) == 2


def test_errors_are_not_cached() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    first, second = backend.submit(QUERY), backend.submit(SAME)
    held.futures[0].set_result(failure(QUERY, "out of memory", ErrorCode.INTERNAL))
    assert (first.result().error, second.result().chat_id) == ("out of memory", "2")
    third = backend.submit(QUERY)
    held.futures[1].set_exception(BackendError("gone"))
    with pytest.raises(BackendError, match="gone"):
        third.result()
    fourth = backend.submit(QUERY)
    held.futures[2].cancel()
    with pytest.raises(CancelledError):
        fourth.result()


def test_the_cache_holds_the_most_recent_answers() -> None:
    backend = DedupBackend(inner := EchoBackend())
    for number in range(MAX_CACHED + 1):
        backend.submit(replace(QUERY, messages=(Message("user", f"What is {number}?"),)))
    backend.submit(replace(QUERY, messages=(Message("user", f"What is {MAX_CACHED}?"),)))
    assert inner.model_calls == MAX_CACHED + 1
    backend.submit(replace(QUERY, messages=(Message("user", "What is 0?"),)))
    assert inner.model_calls == MAX_CACHED + 2


def test_a_submit_that_raises_leaves_nothing_for_equal_queries_to_wait_for() -> None:
    """They once joined a generation that had never started, and waited forever."""

    class Refusing(HeldBackend):
        def submit(self, query: Query, on_text: OnText | None = None, **_: Any) -> Future[Result]:
            if len(self.futures) < 1:
                self.futures.append(Future())
                raise RuntimeError("can't start new thread")
            return super().submit(query, on_text)

    held = Refusing()
    backend = DedupBackend(held)
    with pytest.raises(RuntimeError):
        backend.submit(QUERY)
    second = backend.submit(SAME)
    held.futures[1].set_result(echo(SAME))
    assert second.done()
    assert not second.result().is_error


def test_a_failing_callback_affects_its_own_query_only() -> None:
    """It once raised into the engine, and cost every query that shared the answer its result."""
    held = StreamingBackend()
    backend = DedupBackend(held)
    pieces: list[str] = []

    def fail(_: str) -> None:
        raise ValueError("broken pipe")

    bad, good = backend.submit(QUERY, fail), backend.submit(SAME, pieces.append)
    emit = held.on_texts[0]
    assert emit is not None
    emit("It is")
    held.futures[0].set_result(echo(QUERY))
    assert (bad.result().error_code, good.result().is_error) == (ErrorCode.INTERNAL, False)
    assert pieces == ["It is"]
    late = backend.submit(QUERY, fail, is_interactive=True)
    assert late.result().error == "internal error: ValueError: broken pipe"


@pytest.mark.parametrize("kind", [ClusterQuery, RemoteQuery])
def test_a_failing_callback_fails_only_its_query(kind: type[PendingQuery]) -> None:
    """On a cluster it closed the queue of all workers."""

    def fail(_: str) -> None:
        raise ValueError("broken pipe")

    pending = kind(QUERY, fail)
    pending.show("It is")
    pending.complete(echo(QUERY))
    assert pending.future.result().error == "internal error: ValueError: broken pipe"
