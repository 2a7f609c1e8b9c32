"""Ray, as far as an ingress needs it to reach the engines' shards: finding actors, and taking calls back."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.actor import ActorHandle

LOOKUPS_AT_ONCE = 4
"""One takes a millisecond; while Ray's head is away, all of them wait for the same."""


class Actors:
    """Finds actors in threads of its own.

    To look one up blocks, for a minute while Ray's head is away. In asyncio's threads for all purposes, which are few,
    the look-ups for some lost engines would hold up whatever else needs one: prompts to tokenize, keys to read.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS_AT_ONCE, thread_name_prefix="actors")

    async def find(self, name: str, namespace: str) -> ActorHandle[Any]:
        """The actor of that name.

        Raises:
            ValueError: there is none.
            GetTimeoutError: Ray's head doesn't answer.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, name, namespace)

    def cancel(self, call: Any) -> None:
        """Take back a call, or a stream, that nobody waits for any more."""
        ray.cancel(call)

    def close(self) -> None:
        """Look up nothing more; does not wait for what is under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look_up(self, name: str, namespace: str) -> ActorHandle[Any]:
        return ray.get_actor(name, namespace)
