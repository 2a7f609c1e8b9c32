"""The block pool of a simulated engine: :class:`engine.scheduling.block_pool.BlockPool` without block ids."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice


class Blocks:
    """Counts of anonymous blocks, reference counts of published ones, and the LRU order of those that nobody holds."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.anonymous = 0  # held and not published
        self.held: dict[bytes, int] = {}
        self.unheld: OrderedDict[bytes, None] = OrderedDict()
        self.new: list[bytes] = []  # published or evicted since they were last asked for
        self.gone: list[bytes] = []

    @property
    def num_free(self) -> int:
        return self.num_blocks - self.anonymous - len(self.held)

    def find(self, hashes: Sequence[bytes], limit: int) -> int:
        """How many of the first ``limit`` blocks can be found, in a row from the first."""
        held, unheld = self.held, self.unheld
        for depth, name in enumerate(islice(hashes, limit)):
            if name not in held and name not in unheld:
                return depth
        return min(limit, len(hashes))

    def count_unheld(self, hashes: Sequence[bytes], limit: int) -> int:
        unheld = self.unheld
        return sum(name in unheld for name in islice(hashes, limit))

    def take(self, hashes: Sequence[bytes], limit: int) -> None:
        """Hold published blocks once more."""
        held, unheld = self.held, self.unheld
        for name in islice(hashes, limit):
            count = held.get(name)
            if count is None:
                del unheld[name]
                held[name] = 1
            else:
                held[name] = count + 1

    def allocate(self, count: int) -> None:
        empty = self.num_free - len(self.unheld)
        for _ in range(count - empty):
            self.gone.append(self.unheld.popitem(last=False)[0])
        self.anonymous += count

    def publish(self, name: bytes) -> None:
        """Let a held anonymous block be found."""
        self.anonymous -= 1
        count = self.held.get(name)
        if count is not None:
            self.held[name] = count + 1
        else:
            self.held[name] = 1
            if name in self.unheld:
                del self.unheld[name]
            else:
                self.new.append(name)

    def release(self, hashes: Sequence[bytes], published: int, total: int) -> None:
        """Let go of a request's ``total`` blocks, of which the first ``published`` can be found; its tail first."""
        self.anonymous -= total - published
        held, unheld = self.held, self.unheld
        for i in range(published - 1, -1, -1):
            name = hashes[i]
            count = held[name]
            if count == 1:
                del held[name]
                unheld[name] = None
            else:
                held[name] = count - 1
