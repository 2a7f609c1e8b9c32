"""Which engine takes the next request."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine.messages import EngineLoad


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine as the router sees it: its last known load, and what this ingress has sent since."""

    replica_id: str
    load: EngineLoad
    unseen: int
    """Requests of this ingress that ``load`` can't know of yet."""
    in_flight: int
    """Requests of this ingress that are under way there."""


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The engine with the fewest requests, waiting and running.

    Ties go to the one with fewest of our own, then with the least prompt to compute, then by replica id: equal inputs
    give equal choices.

    Raises:
        ValueError: there is no candidate.
    """

    def cost(candidate: Candidate) -> tuple[int, int, int, str]:
        load = candidate.load
        outstanding = load.waiting_requests + load.running_requests + candidate.unseen
        return outstanding, candidate.in_flight, load.waiting_prefill_tokens, candidate.replica_id

    return min(candidates, key=cost)


class Unseen:
    """Counts requests sent to an engine that its reported load can't include yet.

    A request sent while the last known step was ``s`` may arrive during step ``s + 1``, so only the load after step
    ``s + 2`` surely has it. Without this, all requests between two steps would herd to the engine that was idle at the
    last one.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._sent: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def add(self) -> None:
        """Count one request sent now."""
        self._sent.append(self._steps)

    def update(self, load: EngineLoad) -> None:
        """Take note of a newer load."""
        self._steps = load.steps
        while self._sent and load.steps >= self._sent[0] + 2:
            self._sent.popleft()
