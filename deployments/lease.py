"""Leases: calls of ``EngineReplica.lease``, by which Serve sees requests that otherwise pass it by."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle


def open_lease(leases: DeploymentHandle[Any], name: str, *, replica_id: str) -> asyncio.Task[None]:
    """Open a lease, which lasts until the replica ends it or is lost.

    Args:
        leases: handle of ``EngineReplica.lease``.
        name: what the lease is for: a request, or this ingress with all its requests.
        replica_id: the engine that has them.
    """
    # In an empty context: a lease outlasts the HTTP request in whose turn it is opened, and Ray cancels every actor
    # call made in the context of a client that leaves (ray issue 52476).
    lease = hold_lease(leases, name, replica_id=replica_id)
    return asyncio.get_running_loop().create_task(lease, context=contextvars.Context())


async def hold_lease(leases: DeploymentHandle[Any], name: str, *, replica_id: str) -> None:
    """As :func:`open_lease`, in the caller's task.

    To cancel it takes back a call that waits for a replica. What has reached one is left for the replica to end: Ray
    may or may not carry the cancellation there.

    Args:
        leases: as there.
        name: as there.
        replica_id: as there; ``""`` is no replica's, so whichever comes up ends the lease at once.
    """
    call = leases.remote(name, replica_id=replica_id)
    try:
        await call
    except (RayError, RayServeException):
        return
    finally:
        call.cancel()  # type: ignore[no-untyped-call]  # Ray's
