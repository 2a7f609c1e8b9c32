"""Which engines there are: model, pools and addresses, and the directory that an ingress keeps of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from deployments.routing import Replica


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an ingress must know of the model that the engines serve; lengths are in tokens."""

    model_path: str
    """Folder with config.json and tokenizer, the same on all nodes, or repository: see ``hub.resolve_model``."""
    served_model_name: str
    max_model_len: int
    """Longest sequence that some pool takes."""
    created: int
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """What an ingress must know of a pool before any engine of it is up."""

    name: str
    max_model_len: int
    """Longest sequence in tokens, by its options; its engines say what they really hold."""
    on_demand: bool
    """Whether it may be scaled to zero, so that a request has to call for an engine."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine is found, the named Ray actor that is its shard 0, and what it can hold."""

    spec: Replica
    model_path: str
    """Of its weights; requests move between engines of equal ones without a trace."""
    identity: str
    """Digest of architecture and vocabulary, see ``deployments.identity``."""
    actor_name: str
    namespace: str
    stalled_after_s: float
    start_seconds: float
    """How long it took to start."""

    @property
    def replica_id(self) -> str:
        """Serve's name of the replica."""
        return self.spec.replica_id

    @property
    def pool(self) -> str:
        """Name of its pool."""
        return self.spec.pool

    def to_metadata(self) -> dict[str, Any]:
        """Plain values, as Serve's ``record_replica_metadata`` wants them."""
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> EngineAddress:
        """Inverse of :meth:`to_metadata`."""
        return cls(**{**metadata, "spec": Replica(**metadata["spec"])})


class ReplicaDirectory:
    """Tells an event loop about the engines of one pool, first when subscribed and then whenever they change."""

    def __init__(self, on_change: Callable[[list[EngineAddress]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change

    def publish(self, engines: list[EngineAddress]) -> None:
        """Pass a new set on; called on the request router's own event loop, in a thread of Serve's."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_change, engines)
