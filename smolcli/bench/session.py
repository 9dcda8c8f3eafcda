"""A benchmark session: systems are measured alternately, one at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

from smolcli.backends.base import OpenBackend
from smolcli.bench.measure import Reading, Show, time_backend
from smolcli.bench.workload import stories
from smolcli.settings import BenchPlan, EngineSettings

if TYPE_CHECKING:
    from smolcli.bench.transformers_peer import TransformersPeer

SYSTEM = "smol"


class Session:
    """Measures a backend, which is opened anew for each turn, and optionally transformers.

    transformers runs on a new thread each time: a thread that has used OpenMP keeps its workers,
    which would compete with those of another thread.

    Args:
        settings: the backend's settings.
        open_backend: opens the backend.
        plan: what to measure.
    """

    def __init__(
        self,
        settings: EngineSettings,
        open_backend: OpenBackend,
        plan: BenchPlan,
    ) -> None:
        self.identity: dict[str, Any] = {}
        self._settings = settings
        self._open_backend = open_backend
        self._plan = plan
        self._peer: TransformersPeer | None = None

    def run(self, num_turns: int, compares: bool, say: Callable[[str], None]) -> list[Reading]:
        """Measure every system in every turn.

        Args:
            num_turns: number of measurements of everything.
            compares: whether to measure transformers as well.
            say: called with a line of progress for each measurement.
        """

        def show(reading: Reading) -> None:
            rate = reading.tokens_per_second
            say(f"{reading.system}: {reading.work} {reading.size}: {rate:,.0f} tokens/s")

        readings = []
        for turn in range(num_turns):
            readings += self._time_backend(turn, show)
            if compares:
                with ThreadPoolExecutor(1) as thread:
                    readings += thread.submit(self._time_peer, turn, show).result()
        return readings

    def _time_backend(self, turn: int, show: Show) -> list[Reading]:
        with closing(self._open_backend(self._settings)) as backend:
            self.identity = backend.identity()
            for future in [backend.submit(query) for query in stories(2, max_new_tokens=2)]:
                future.result()
            return time_backend(backend, self._plan, turn, SYSTEM, show)

    def _time_peer(self, turn: int, show: Show) -> list[Reading]:
        from smolcli.bench.transformers_peer import TransformersPeer

        if self._peer is None:
            self._peer = TransformersPeer(self.identity)
        return self._peer.time(self._plan, turn, show)
