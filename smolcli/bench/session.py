"""Systems that take turns, each alone with the machine while it is timed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

from smolcli.backends.base import Backend
from smolcli.bench.measure import Reading, Show, time_backend
from smolcli.bench.work import stories
from smolcli.settings import BenchPlan, EngineSettings

if TYPE_CHECKING:
    from smolcli.bench.peer import Peer

SYSTEM = "smol"


class Session:
    """Times backends that are opened anew for each turn.

    What computes with OpenMP keeps the workers of its thread; two such threads hinder each
    other, so that each system's thread ends before the next one's begins.

    Args:
        settings: of the backend.
        open_backend: opens it.
        plan: what is timed.
    """

    def __init__(
        self,
        settings: EngineSettings,
        open_backend: Callable[[EngineSettings], Backend],
        plan: BenchPlan,
    ) -> None:
        self.identity: dict[str, Any] = {}
        self._settings = settings
        self._open_backend = open_backend
        self._plan = plan
        self._peer: Peer | None = None

    def run(self, num_turns: int, compares: bool, say: Callable[[str], None]) -> list[Reading]:
        """All readings of all turns.

        Args:
            num_turns: how often everything is timed.
            compares: whether transformers takes turns, too.
            say: told of each reading, for who waits.
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
        from smolcli.bench.peer import Peer

        if self._peer is None:
            self._peer = Peer(self.identity)
        return self._peer.time(self._plan, turn, show)
