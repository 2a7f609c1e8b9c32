"""Tokens from an engine to the ingresses: one stream for each pair, one item a step.

The engine side (:class:`Fanout`, in shard 0) sorts the deltas of a step by ingress; the ingress side
(:class:`Demultiplexer`) sorts them by request. Between the two travels one :class:`Item`, so Ray messages grow with
steps, not with tokens x requests. Whoever reads slowly gets several steps merged into one.

Everything here lives on one event loop and takes no locks; only :meth:`Fanout.publish` is called from another thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from deployments.mailbox import Inbox, Item, Outbox, Refusal, decode_item
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineLoad, EngineRequest, StepOutput


class Fanout:
    """Sorts the deltas of each step by the ingress that asked for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, load: EngineLoad) -> None:
        self._loop = loop
        self._load = load
        self._outboxes: dict[str, Outbox] = {}
        self._owners: dict[str, Outbox] = {}  # by request id
        self._cached: dict[bytes, None] = {}  # hashes of the blocks that can be found, oldest first

    @property
    def load(self) -> EngineLoad:
        """The engine's load after the last step published."""
        return self._load

    def open(self, ingress_id: str) -> Outbox:
        """The outbox of an ingress that begins to listen."""
        outbox = self._outboxes[ingress_id] = Outbox(self._load, self._cached)
        return outbox

    def claim(self, ingress_id: str, requests: Iterable[EngineRequest]) -> None:
        """Note to whom the tokens of new requests go.

        Raises:
            EngineDeadError: the ingress has no open stream here, so nobody would hear the tokens.
        """
        outbox = self._outboxes.get(ingress_id)
        if outbox is None:
            raise EngineDeadError(f"ingress {ingress_id} has no open stream here; connect to the engine again")
        for request in requests:
            self._owners[request.request_id] = outbox
            outbox.request_ids.add(request.request_id)

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests whose tokens nobody wants any more."""
        for request_id in request_ids:
            self._forget(request_id)

    def under_way(self, names: Iterable[str]) -> list[str]:
        """Those of some requests and ingresses that still want tokens: requests not over, ingresses that have one."""
        busy = {ingress_id for ingress_id, outbox in self._outboxes.items() if outbox.request_ids}
        return [name for name in names if name in self._owners or name in busy]

    def leave(self, ingress_id: str, outbox: Outbox) -> list[str]:
        """Close the stream of an ingress that is gone; its requests, for the engine to abort. May be called again."""
        if self._outboxes.get(ingress_id) is outbox:
            del self._outboxes[ingress_id]
        orphans = list(outbox.request_ids)
        self.release(orphans)
        outbox.close()
        return orphans

    def publish(self, output: StepOutput) -> None:
        """Hand over a step; called in the engine thread, returns at once."""
        self._loop.call_soon_threadsafe(self._distribute, output)

    def fail(self, failure: EngineDeadError) -> None:
        """End every stream with an error."""
        for outbox in self._outboxes.values():
            outbox.close(failure)

    def _distribute(self, output: StepOutput) -> None:
        self._load = output.load
        for delta in output.deltas:
            if (outbox := self._owners.get(delta.request_id)) is None:
                continue  # aborted while the step ran
            outbox.put(delta)
            if delta.finish_reason is not None:
                self._forget(delta.request_id)
        for request_id, error in output.refused.items():
            if (outbox := self._owners.get(request_id)) is not None:
                outbox.refuse(request_id, Refusal(str(error), error.field, error.code))
                self._forget(request_id)
        self._cached.update(dict.fromkeys(output.cached))
        for block_hash in output.evicted:
            self._cached.pop(block_hash, None)
        for outbox in self._outboxes.values():
            outbox.note_blocks(output.cached, output.evicted)
            outbox.flush(output.load)

    def _forget(self, request_id: str) -> None:
        outbox = self._owners.pop(request_id, None)
        if outbox is not None:
            outbox.request_ids.discard(request_id)


class Demultiplexer:
    """Sorts the items of one engine by request."""

    def __init__(self, on_item: Callable[[Item], None]) -> None:
        """``on_item`` is called with each item before its tokens go to their requests."""
        self._on_item = on_item
        self._inboxes: dict[str, Inbox] = {}

    def __len__(self) -> int:
        return len(self._inboxes)

    def open(self, request_id: str) -> Inbox:
        """The inbox of a request that is about to be submitted.

        Raises:
            ValueError: the id is in use.
        """
        if request_id in self._inboxes:
            raise ValueError(f"request id {request_id!r} is in use")
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    def close(self, request_id: str) -> None:
        """Forget a request; tokens that still come for it are dropped."""
        self._inboxes.pop(request_id, None)

    def deliver(self, encoded: bytes) -> None:
        """Hand one item's tokens and refusals to their requests."""
        item = decode_item(encoded)
        self._on_item(item)
        for delta in item.deltas:
            if (inbox := self._inboxes.get(delta.request_id)) is not None:
                inbox.put(delta)
        for request_id, refusal in item.refused.items():
            if (inbox := self._inboxes.get(request_id)) is not None:
                inbox.fail(RequestError(refusal.message, field=refusal.field, code=refusal.code))

    def fail(self, failure: Exception) -> None:
        """End every request under way with an error."""
        for inbox in self._inboxes.values():
            inbox.fail(failure)
