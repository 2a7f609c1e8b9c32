"""A crowd of clients, more than one engine takes, and pools that grow and shrink soon enough for a test."""

from __future__ import annotations

import threading
from typing import Any, Self

from conftest import ENGINE
from probe import greedy

TOKENS = 150
CLIENTS = 12
SEATS = 4
"""Requests that an engine of these pools computes at once."""
AUTOSCALING = {
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 2.0,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.0,
    "start_s": 5.0,
}


def pool(name: str, *, most: int, **autoscaling: Any) -> dict[str, Any]:
    """A pool of none to ``most`` engines."""
    assert min(CLIENTS, ENGINE["max_num_seqs"]) > SEATS
    return {
        "name": name,
        "engine": {"max_num_seqs": SEATS},
        "replicas": {"min": 0, "max": most},
        "autoscaling": {**AUTOSCALING, **autoscaling},
    }


class Crowd:
    """Clients in threads of their own, who ask again as soon as they are answered, until they leave.

    Attributes:
        answers: tokens of each answer.
    """

    def __init__(self, probe: Any) -> None:
        self.answers: list[int] = []
        self._probe = probe
        self._gone = [threading.Event() for _ in range(CLIENTS)]
        self._threads = [threading.Thread(target=self._ask, args=(client,)) for client in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        for thread in self._threads:
            thread.join()

    def leave(self, *, stay: int = 0) -> None:
        """All but ``stay`` clients ask nothing more."""
        for gone in self._gone[stay:]:
            gone.set()

    def _ask(self, client: int) -> None:
        number = 0
        while not self._gone[client].is_set():
            number += 1
            request = greedy(f"client-{client}-{number}", [1 + client, 2, 3], TOKENS)
            token_ids, _ = self._probe.generate.remote(request).result(timeout_s=240)
            self.answers.append(len(token_ids))
