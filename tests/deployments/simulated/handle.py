"""Serve's handle of a pool, as far as an ingress calls it for leases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError


@dataclass
class Lease:
    """A lease that an ingress asked for: of a request or of itself, with one replica; or a call for any replica."""

    name: str
    replica_id: str
    over: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def __await__(self) -> Any:
        return self.over.__await__()

    def cancel(self) -> None:
        self.over.cancel()


class Handle:
    """Leases last until the replica ends them, or is lost."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        """All that were ever asked for."""

    @property
    def open(self) -> list[Lease]:
        return [lease for lease in self.leases if not lease.over.done()]

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, name: str, *, replica_id: str) -> Lease:
        self.leases.append(Lease(name, replica_id))
        return self.leases[-1]

    def look(self, under_way: dict[str, Callable[[list[str]], Collection[str]]]) -> None:
        """What replicas do now and then: end the leases that are over.

        Args:
            under_way: by the id of each replica that there is, which of some names it has.
        """
        for lease in self.open:
            if lease.replica_id == "":  # whichever replica comes up ends it
                if under_way:
                    lease.over.set_result(False)
            elif lease.replica_id not in under_way:
                lease.over.set_exception(RayActorError())
            elif not under_way[lease.replica_id]([lease.name]):
                lease.over.set_result(True)
