"""Which engines there are: addresses, and the directory that an ingress keeps of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an ingress must know of the model that the engines serve; lengths are in tokens."""

    model_path: str
    """Folder with config.json and tokenizer, the same on all nodes, or repository: see ``hub.resolve_model``."""
    served_model_name: str
    max_model_len: int
    block_size: int
    created: int
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine is found: the named Ray actor that is its shard 0."""

    replica_id: str
    actor_name: str
    namespace: str
    stalled_after_s: float
    info: ModelInfo

    def to_metadata(self) -> dict[str, Any]:
        """Plain values, as Serve's ``record_replica_metadata`` wants them."""
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> EngineAddress:
        """Inverse of :meth:`to_metadata`."""
        return cls(**{**metadata, "info": ModelInfo(**metadata["info"])})


class ReplicaDirectory:
    """Tells an event loop about the set of engines, first when subscribed and then whenever it changes."""

    def __init__(self, on_change: Callable[[list[EngineAddress]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change

    def publish(self, engines: list[EngineAddress]) -> None:
        """Pass a new set on; called on the request router's own event loop, in a thread of Serve's."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_change, engines)
