"""Equal questions are answered once, and nobody notices but by the clock."""

from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import pytest
from fakes import EchoBackend, HeldBackend, echo

from smolcli.backends.base import OnText
from smolcli.backends.dedup import MAX_KEPT, DedupBackend
from smolcli.errors import BackendError
from smolcli.types import ErrorCode, Message, Query, Result, Sampling, failure

QUERY = Query("1", (Message("user", "What is gravity?"),), line=1)
SAME = replace(QUERY, chat_id="2", line=7, metadata={"row": 2}, sampling=Sampling(seed=3))


class TalkingBackend(HeldBackend):
    """Held, with the text callbacks of its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.on_texts: list[OnText | None] = []

    def submit(self, query: Query, on_text: OnText | None = None, **options: Any) -> Future[Result]:
        self.on_texts.append(on_text)
        return super().submit(query, on_text, **options)


def test_equal_questions_in_flight_are_generated_once() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    first, second = backend.submit(QUERY), backend.submit(SAME)
    assert len(held.futures) == 1
    held.futures[0].set_result(answer := echo(QUERY))
    assert first.result() == answer
    theirs = second.result()
    assert (theirs.chat_id, theirs.line, theirs.metadata) == ("2", 7, {"row": 2})
    assert (theirs.response, theirs.usage) == (answer.response, answer.usage)
    assert backend.counters().shared_queries == 1


def test_a_kept_answer_is_given_at_once() -> None:
    backend = DedupBackend(inner := EchoBackend())
    pieces: list[str] = []
    backend.submit(QUERY)
    later = backend.submit(SAME, pieces.append, is_interactive=True).result()
    assert inner.model_calls == 1
    assert "".join(pieces) == later.response == echo(QUERY).response


def test_answers_of_another_model_are_not_kept() -> None:
    """A gateway's service may come back as another one."""
    backend = DedupBackend(inner := EchoBackend())
    backend.submit(QUERY).result()
    inner.settings = replace(inner.settings, model="another")
    backend.submit(SAME).result()
    assert inner.model_calls == 2
    backend.submit(SAME).result()
    assert inner.model_calls == 2


@pytest.mark.parametrize(
    "other",
    [
        replace(QUERY, messages=(Message("user", "What is gravity"),)),
        replace(QUERY, stop=(".",)),
        replace(QUERY, sampling=Sampling(max_new_tokens=5)),
        replace(QUERY, sampling=Sampling(temperature=1.0, seed=4)),
    ],
)
def test_other_questions_are_not_the_same(other: Query) -> None:
    backend = DedupBackend(inner := EchoBackend())
    backend.submit(QUERY)
    backend.submit(other)
    assert inner.model_calls == 2


def test_a_drawn_answer_is_shared_by_equal_seeds_alone() -> None:
    backend = DedupBackend(inner := EchoBackend())
    drawn = replace(QUERY, sampling=Sampling(temperature=1.0, seed=4))
    for query in (drawn, replace(drawn, chat_id="2"), replace(drawn, sampling=Sampling(seed=5))):
        backend.submit(query)
    assert inner.model_calls == 2


def test_the_answer_goes_on_until_the_last_who_waits_has_left() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    first, second = backend.submit(QUERY), backend.submit(SAME)
    first.cancel()
    assert not held.futures[0].cancelled()
    second.cancel()
    assert held.futures[0].cancelled()
    backend.submit(QUERY)
    assert len(held.futures) == 2, "a question that was given up is asked anew"


def test_who_joins_a_stream_gets_its_beginning_too() -> None:
    held = TalkingBackend()
    backend = DedupBackend(held)
    first: list[str] = []
    second: list[str] = []
    backend.submit(QUERY, first.append)
    say = held.on_texts[0]
    assert say is not None
    say("It is")
    backend.submit(SAME, second.append)
    say(" a force.")
    assert (first, second) == (["It is", " a force."], ["It is", " a force."])
    assert len(held.futures) == 1


def test_an_urgent_question_does_not_wait_for_one_that_is_not() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    backend.submit(QUERY)
    backend.submit(SAME, is_interactive=True)
    assert len(held.futures) == 2


def test_failures_are_not_kept() -> None:
    held = HeldBackend()
    backend = DedupBackend(held)
    first, second = backend.submit(QUERY), backend.submit(SAME)
    held.futures[0].set_result(failure(QUERY, "no luck", ErrorCode.INTERNAL))
    assert (first.result().error, second.result().chat_id) == ("no luck", "2")
    third = backend.submit(QUERY)
    held.futures[1].set_exception(BackendError("gone"))
    with pytest.raises(BackendError, match="gone"):
        third.result()
    fourth = backend.submit(QUERY)
    held.futures[2].cancel()
    with pytest.raises(CancelledError):
        fourth.result()


def test_only_the_latest_answers_are_kept() -> None:
    backend = DedupBackend(inner := EchoBackend())
    for number in range(MAX_KEPT + 1):
        backend.submit(replace(QUERY, messages=(Message("user", f"What is {number}?"),)))
    backend.submit(replace(QUERY, messages=(Message("user", f"What is {MAX_KEPT}?"),)))
    assert inner.model_calls == MAX_KEPT + 1
    backend.submit(replace(QUERY, messages=(Message("user", "What is 0?"),)))
    assert inner.model_calls == MAX_KEPT + 2
