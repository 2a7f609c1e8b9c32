"""Ray, as far as a connection uses it, with real shards at the other end.

It keeps no order, as Ray keeps none between two calls of an actor with an event loop: each call arrives, and is
answered, when the test says so. So does what takes a call back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Container, Generator
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayError, TaskCancelledError

from deployments.actors import Actors
from deployments.connection import UNREAD_ITEMS
from deployments.shard import Shard
from deployments.token_stream import Fanout
from engine.config import EngineConfig
from engine.errors import EngineDeadError
from tests.deployments.simulated.toy_engine import ToyEngine


class Call:
    """A call of an actor on its way there, or its answer on the way back."""

    def __init__(self, arrive: Callable[[], Awaitable[None]]) -> None:
        self._arrive = arrive
        self._error: RayError | None = None
        self._arrived = False
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def go_on(self) -> bool:
        """Arrive, or come back; whether it is over now."""
        if not self._arrived:
            self._arrived = True
            try:
                await self._arrive()
            except EngineDeadError as error:
                self._error = RayError(str(error))
            return False
        if self._error is not None:
            self.fail(self._error)
        elif not self.answer.done():
            self.answer.set_result(None)
        return True

    def fail(self, error: RayError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # Ray doesn't complain of answers that nobody awaits


class Method:
    """A method of an actor."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *args: Any) -> Any:
        return self._call(*args)


class Tether:
    """An object that never comes to be, until it is lost."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._lost = asyncio.Event()

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._lost.wait().__await__()
        raise TaskCancelledError()

    def cancel(self) -> None:
        self._wire.send(self._lose)

    async def _lose(self) -> None:
        self._lost.set()


class Stream:
    """A streaming call. What the engine has sent is heard as long as it can be reached."""

    def __init__(self, wire: Wire, items: AsyncGenerator[bytes, None]) -> None:
        self._wire = wire
        self._items = items
        self._sent: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._sending = asyncio.ensure_future(self._send())

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Awaitable[bytes]:
        while not (self._wire.dead or (self._wire.reachable and (self._sent or self._sending.done()))):
            await self._wait()
        item: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self._wire.dead:
            item.set_exception(RayActorError())
        elif self._sent:
            item.set_result(self._sent.popleft())
            self.wake()
        elif self._sending.cancelled() or self._sending.exception() is None:
            raise StopAsyncIteration
        else:
            item.set_exception(RayError(str(self._sending.exception())))
        return item

    def cancel(self) -> None:
        self._wire.send(self._stop)

    def stop(self) -> None:
        self._sending.cancel()

    def wake(self) -> None:
        self._changed.set()

    async def _stop(self) -> None:
        self._sending.cancel()

    async def _send(self) -> None:
        try:
            async for item in self._items:
                self._sent.append(item)
                self.wake()
                while len(self._sent) >= UNREAD_ITEMS:
                    await self._wait()
        finally:
            self.wake()
            await self._items.aclose()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Wire:
    """The handle of a shard's actor, as one ingress or several have it, and the shard itself."""

    def __init__(self) -> None:
        self.engine = ToyEngine()
        self.fanout = Fanout(asyncio.get_running_loop(), self.engine.load)
        self.under_way: list[Call] = []
        self.dead = False
        self.reachable = True
        self.connections: list[str] = []
        """Names of all that ever opened a stream."""
        self._shard = Shard(EngineConfig(model=""), rank=0)
        self._shard._engine, self._shard._fanout = self.engine, self.fanout  # type: ignore[assignment]  # a stand-in
        self._streams: list[Stream] = []
        self._unheard: list[asyncio.Future[None]] = []  # what is asked of one that can't be reached
        self.submit = Method(lambda *args: self.send(lambda: self._shard.submit(*args)))
        self.abort = Method(lambda *args: self.send(lambda: self._shard.abort(*args)))
        self.stream = Method(self._stream)
        self.tether = Method(lambda: Tether(self))
        self.is_there = Method(self._is_there)

    def send(self, arrive: Callable[[], Awaitable[None]]) -> asyncio.Future[None]:
        """Begin a call; its answer."""
        call = Call(arrive)
        if self.dead:
            call.fail(RayActorError())
        else:
            self.under_way.append(call)
        return call.answer

    async def go_on(self, number: int) -> None:
        """One of the calls under way arrives, or its answer does."""
        call = self.under_way[number % len(self.under_way)]
        if await call.go_on():
            self.under_way.remove(call)

    async def deliver(self, number: int = 0) -> None:
        """One of the calls under way arrives and is answered."""
        call = self.under_way.pop(number % len(self.under_way))
        while not await call.go_on():
            pass
        await asyncio.sleep(0)

    def step(self, *, passed_over: Container[int] = ()) -> None:
        self.fanout.publish(self.engine.step(passed_over=passed_over))

    def set_reachable(self, reachable: bool) -> None:
        """Let a network be cut between the engine and its ingresses, or be whole again."""
        self.reachable = reachable
        if reachable:
            self._wake()

    def die(self) -> None:
        """The process ends; what it had sent and nobody heard is lost."""
        self.dead = True
        for call in self.under_way:
            call.fail(RayActorError())
        self.under_way.clear()
        for stream in self._streams:
            stream.stop()
        self._wake()

    def _stream(self, ingress_id: str, tether: list[Any]) -> Stream:
        self.connections.append(ingress_id)
        stream = Stream(self, self._shard.stream(ingress_id, tether))
        self._streams.append(stream)
        return stream

    def _is_there(self) -> asyncio.Future[None]:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unheard.append(answer)
        if self.reachable or self.dead:
            self._wake()
        return answer

    def _wake(self) -> None:
        for stream in self._streams:
            stream.wake()
        for answer in self._unheard:
            if not answer.done():
                answer.set_result(None)
        self._unheard.clear()


class Network(Actors):
    """Ray's directory of actors, and those in it."""

    def __init__(self) -> None:
        super().__init__()
        self.wires: dict[str, Wire] = {}  # by the name of the actor
        self.head_is_away = False

    async def find(self, name: str, namespace: str) -> Any:
        if self.head_is_away:
            raise GetTimeoutError("probably because the GCS server is dead or under high load")
        if name not in self.wires or self.wires[name].dead:
            raise ValueError(f"no actor of the name {name}")
        return self.wires[name]

    def cancel(self, call: Any) -> None:
        call.cancel()
