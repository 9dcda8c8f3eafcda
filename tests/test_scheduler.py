"""The scheduler's guarantees for interactive and batch sequences that compete."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolcli.engine.scheduler import BATCH_STEP, INTERACTIVE_TURNS, Scheduler
from smolcli.engine.sequence import Sequence
from smolcli.types import Sampling

EOS = 2


class Simulation:
    """Runs a scheduler without a model: every planned token takes no time."""

    def __init__(self, max_batch_size: int, max_step_tokens: int = 256, budget: int = 1 << 30):
        self.scheduler = Scheduler(
            max_batch_size, max_step_tokens, budget, lambda s: s.max_tokens, lambda s: None
        )
        self.num_steps = 0

    def add(self, prompt_tokens: int, new_tokens: int, is_interactive: bool) -> Sequence:
        sequence = Sequence(
            [9] * prompt_tokens, Sampling(max_new_tokens=new_tokens), is_interactive
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """Returns the sequences that took part."""
        self.num_steps += 1
        items = self.scheduler.plan()
        assert self.scheduler.reserved_bytes <= self.scheduler.kv_cache_bytes
        assert len({id(item.sequence) for item in items}) == len(items)
        for item in items:
            item.sequence.num_cached = item.stop
            if item.completes:
                item.sequence.append(9, frozenset({EOS}))
        self.scheduler.retire()
        return [item.sequence for item in items]

    def steps_until(self, condition: Callable[[], bool], limit: int) -> int:
        for number in range(limit):
            if condition():
                return number
            self.step()
        raise AssertionError(f"not within {limit} steps")


class Clients:
    """Clients that each send a new query as soon as the last one is answered."""

    def __init__(
        self, simulation: Simulation, num_clients: int, is_interactive: bool, prompt: int, new: int
    ) -> None:
        self.num_answered = 0
        self._simulation = simulation
        self._query = (prompt, new, is_interactive)
        self._pending = [simulation.add(*self._query) for _ in range(num_clients)]

    def resend(self) -> None:
        for index, sequence in enumerate(self._pending):
            if sequence.is_finished:
                self.num_answered += 1
                self._pending[index] = self._simulation.add(*self._query)


@pytest.mark.parametrize("num_clients", [1, 63, 64, 73, 200])
@pytest.mark.parametrize("new_tokens", [1, 50])
def test_batch_work_advances_under_any_chat_load(num_clients: int, new_tokens: int) -> None:
    """With 64 busy chat clients, a batch sequence once was never admitted in 5,000 steps."""
    simulation = Simulation(64)
    clients = Clients(simulation, num_clients, True, 20, new_tokens)
    for _ in range(200):
        simulation.step()
        clients.resend()
    watched = simulation.add(20, 50, is_interactive=False)
    num_steps = 0
    while not watched.is_finished:
        simulation.step()
        clients.resend()
        num_steps += 1
        assert num_steps < 400 * max(1, num_clients // 64)
    assert clients.num_answered > num_clients


@pytest.mark.parametrize("prompt_tokens", [20, 2000])
def test_chat_is_admitted_at_once_under_any_batch_load(prompt_tokens: int) -> None:
    simulation = Simulation(64)
    clients = Clients(simulation, 500, False, prompt_tokens, 100)
    for _ in range(200):
        simulation.step()
        clients.resend()
    for _ in range(20):
        watched = simulation.add(20, 10, is_interactive=True)
        num_steps = simulation.steps_until(lambda: watched.is_finished, 30)  # noqa: B023
        assert num_steps <= 10 + BATCH_STEP
        clients.resend()


@pytest.mark.parametrize("max_batch_size", [1, 4, 16])
@pytest.mark.parametrize("cached_tokens", [60, 1 << 30])
def test_batch_work_holds_its_quarter_of_the_slots(max_batch_size: int, cached_tokens: int) -> None:
    """As long as both priorities have more work than fits, in slots or in memory."""
    simulation = Simulation(max_batch_size, budget=cached_tokens)
    chat = Clients(simulation, 50, True, 20, 5)
    batch = Clients(simulation, 50, False, 20, 5)
    held = []
    for _ in range(600):
        simulation.step()
        chat.resend()
        batch.resend()
        held.append(sum(not s.is_interactive for s in simulation.scheduler.running))
    quarter = max(1, max_batch_size // 4) if cached_tokens > 1000 else 0.25
    assert sum(held[100:]) / len(held[100:]) >= quarter * 0.7
    assert min(chat.num_answered, batch.num_answered) > 600 // (BATCH_STEP * 10)
    assert chat.num_answered > batch.num_answered


def test_a_batch_sequence_that_needs_the_whole_cache_gets_it() -> None:
    """Small interactive sequences would otherwise take every byte that becomes free."""
    simulation = Simulation(8, budget=100)
    clients = Clients(simulation, 30, True, 5, 5)
    for _ in range(20):
        simulation.step()
        clients.resend()
    watched = simulation.add(50, 50, is_interactive=False)
    for _ in range(1000):
        simulation.step()
        clients.resend()
        if watched.is_finished:
            break
    assert watched.is_finished


def test_long_prompts_of_one_priority_leave_prefill_tokens_to_the_other() -> None:
    """A flood of long interactive prompts once took every token of every step."""
    simulation = Simulation(64)
    clients = Clients(simulation, 100, True, 5000, 1)
    watched = simulation.add(1000, 1, is_interactive=False)
    num_steps = 0
    while not watched.is_finished:
        simulation.step()
        clients.resend()
        num_steps += 1
    most_steps = BATCH_STEP * -(-1000 // 128)
    assert num_steps <= 1 + most_steps + 5000 * (INTERACTIVE_TURNS + 73) // 256


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 40), st.booleans()), min_size=1, max_size=60
    ),
    st.integers(1, 9),
    st.sampled_from([8, 64, 256]),
    st.integers(0, 1000),
)
@settings(max_examples=60)
def test_everything_is_answered_in_the_order_of_its_priority(
    queries: list[tuple[int, int, bool]], max_batch_size: int, max_step_tokens: int, seed: int
) -> None:
    simulation = Simulation(max_batch_size, max_step_tokens, budget=400)
    source = random.Random(seed)
    sequences: list[Sequence] = []
    for query in queries:
        sequences.append(simulation.add(*query))
        for _ in range(source.randrange(3)):
            simulation.step()
    simulation.steps_until(lambda: all(s.is_finished for s in sequences), 20_000)
    assert simulation.scheduler.reserved_bytes == 0
    for is_interactive in (False, True):
        admitted = [s.admitted_at for s in sequences if s.is_interactive == is_interactive]
        assert admitted == sorted(admitted)  # type: ignore[type-var]
