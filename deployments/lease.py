"""Leases: calls of ``EngineReplica.lease``, by which Serve sees requests that otherwise pass it by."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle


def open_lease(
    leases: DeploymentHandle[Any], request_id: str, *, ingress_id: str, replica_id: str
) -> asyncio.Task[None]:
    """Open a lease, which lasts until the task is cancelled, or the replica ends it or is lost.

    Args:
        leases: handle of ``EngineReplica.lease``.
        request_id: what the lease is for.
        ingress_id: name of this ingress process.
        replica_id: the engine that has the request; ``""`` for a request that waits for one to come up.
    """
    lease = hold_lease(leases, request_id, ingress_id=ingress_id, replica_id=replica_id)
    # In an empty context: a lease outlasts the HTTP request in whose turn it is opened, and Ray cancels every actor
    # call made in the context of a client that leaves (ray issue 52476).
    return asyncio.get_running_loop().create_task(lease, context=contextvars.Context())


async def hold_lease(leases: DeploymentHandle[Any], request_id: str, *, ingress_id: str, replica_id: str) -> None:
    """As :func:`open_lease`, in the caller's task."""
    call = leases.remote(request_id, ingress_id=ingress_id, replica_id=replica_id)
    try:
        # Awaited, because where the handle's router runs on this loop (``deployments.app.IN_ONE_LOOP``), a call that
        # nobody awaits can't be cancelled once it has reached its replica, which would keep the lease for good.
        await call
    except (RayError, RayServeException):
        return
    finally:
        call.cancel()  # type: ignore[no-untyped-call]  # Ray's
