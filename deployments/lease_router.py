"""LeaseRouter: Serve's request router for the engines.

Serve already tells every handle which replicas run: the controller pushes the set, with each replica's metadata, to
the handle's request router. This one passes the set on to the ingress's :class:`ReplicaDirectory`, so discovery needs
no polling and no registry of its own, and it routes each lease to the replica that the ingress chose.

Serve pickles the module of a request router by value, so nothing else may live here: another process would get a copy
of it that is not the same class.
"""

from __future__ import annotations

import weakref
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.directory import EngineAddress, ReplicaDirectory


class LeaseRouter(RequestRouter):
    """Routes each lease to the replica that the ingress chose, and publishes the set of replicas."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve once, before the first replicas are known."""
        self._directories: weakref.WeakSet[ReplicaDirectory] = weakref.WeakSet()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with every new set of replicas."""
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call finds a replica dead, before the controller says so."""
        super().on_replica_actor_died(replica_id)
        self._publish()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for one lease: the one named by ``replica_id``, and only that one.

        If it is gone, another gets the lease and turns it down at once, which ends it; nothing else would, as Serve
        keeps on routing what has no replica. So does the lease of a request that called for the first engine of a pool.

        A call with a :class:`ReplicaDirectory` is no lease but a subscription: what is passed to
        ``handle.choose_replica`` comes here by reference, and there is no other public way from a handle to its router.
        """
        if pending_request is None:
            return [candidate_replicas]
        for argument in pending_request.args:
            if isinstance(argument, ReplicaDirectory):
                self._directories.add(argument)
                self._publish()
        pending_request.routing_context.should_backoff = True  # there is no second choice to try without a pause
        wanted = pending_request.kwargs.get("replica_id")
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        return [chosen or candidate_replicas]

    def _publish(self) -> None:
        engines = [
            EngineAddress.from_metadata(replica.replica_metadata)
            for replica in self.curr_replicas.values()
            if replica.replica_metadata
        ]
        engines.sort(key=lambda engine: engine.replica_id)
        for directory in list(self._directories):
            directory.publish(engines)
