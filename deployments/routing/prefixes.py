"""Who has which blocks cached: an inverted index over the replicas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import filterfalse
from operator import and_

import numpy as np
from numpy.typing import NDArray

CHUNK = 32
FEW = 8
"""Up to so many replicas are faster told one by one than by unpacking their bits."""

_REPORTED = 1
_EXPECTED = 2  # and its multiples: how many requests under way will cache the block


class PrefixIndex:
    """Block hash -> the set of replicas where it is cached, as the bits of an integer.

    Replicas are named by small integers, *slots*. A block is cached where an engine has said so, or where a request
    has been sent that will compute it (*expected*, until that request's first token: what it computed has been reported
    by then). A chain's match on all replicas at once is a running AND of bit sets, so it costs a look-up a block, not a
    look-up a block and replica. Memory: about 250 bytes for each block and replica.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._present: list[dict[bytes, int]] = []
        self._bits: list[int] = []

    def __len__(self) -> int:
        """Different blocks that are cached somewhere."""
        return len(self._holders)

    def open(self, slot: int) -> None:
        """Make sure that ``slot`` exists; a new one has nothing cached."""
        while len(self._bits) <= slot:
            self._bits.append(1 << len(self._bits))
            self._present.append({})

    def clear(self, slot: int) -> None:
        """Forget everything that is cached at ``slot``, reported and expected."""
        for name in list(self._present[slot]):
            self._drop(slot, name)
        self._present[slot] = {}

    def report(self, slot: int, cached: Iterable[bytes], evicted: Iterable[bytes]) -> None:
        """Take note of what an engine has said; of a hash in both, the eviction counts."""
        present, holders, bit = self._present[slot], self._holders, self._bits[slot]
        for name in cached:
            known = present.get(name)
            if known is None:
                present[name] = _REPORTED
                others = holders.get(name)
                holders[name] = bit if others is None else others | bit
            else:
                present[name] = known | _REPORTED
        for name in evicted:
            known = present.get(name)
            if known is not None and known & _REPORTED:
                if known == _REPORTED:
                    del present[name]
                    self._drop(slot, name)
                else:
                    present[name] = known - _REPORTED

    def expect(self, slot: int, hashes: Iterable[bytes]) -> None:
        """A request that will compute these blocks has been sent there."""
        present, holders, bit = self._present[slot], self._holders, self._bits[slot]
        for name in hashes:
            known = present.get(name)
            if known is None:
                present[name] = _EXPECTED
                others = holders.get(name)
                holders[name] = bit if others is None else others | bit
            else:
                present[name] = known + _EXPECTED

    def unexpect(self, slot: int, hashes: Iterable[bytes]) -> None:
        """Take one :meth:`expect` back."""
        present = self._present[slot]
        for name in hashes:
            known = present.get(name, 0)
            if known == _EXPECTED:
                del present[name]
                self._drop(slot, name)
            elif known > _EXPECTED:
                present[name] = known - _EXPECTED

    def match(self, hashes: Sequence[bytes], limit: int, size: int) -> NDArray[np.float64] | None:
        """Blocks of the chain's first ``limit`` that are cached in a row from the first; float64 [size], by slot.

        None if nothing is cached anywhere.
        """
        holders = self._holders
        limit = min(limit, len(hashes))
        alive = holders.get(hashes[0], 0) if limit else 0
        if not alive:
            return None
        depths = np.zeros(size)
        begin = 0  # every replica in alive has the first `position` blocks; those up to begin are in depths
        position = 1
        while position < limit and alive & (alive - 1):
            chunk = hashes[position : min(position + CHUNK, limit)]
            if reduce(and_, [holders.get(name, 0) for name in chunk], alive) == alive:
                position += len(chunk)
                continue
            for name in chunk:
                left = alive & holders.get(name, 0)
                if left != alive:
                    _add(depths, alive, position - begin)
                    begin, alive = position, left
                    if not alive & (alive - 1):
                        break
                position += 1
        if alive and position < limit:  # a single replica: its own table is faster
            present = self._present[alive.bit_length() - 1]
            rest = hashes[position:limit]
            missing = next(filterfalse(present.__contains__, rest), None)
            position = limit if missing is None else position + rest.index(missing)
        if alive:
            _add(depths, alive, position - begin)
        return depths

    def _drop(self, slot: int, name: bytes) -> None:
        left = self._holders[name] & ~self._bits[slot]
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]


def _add(depths: NDArray[np.float64], bits: int, amount: int) -> None:
    """Add ``amount`` at every slot whose bit is set."""
    if bits.bit_count() <= FEW:
        while bits:
            lowest = bits & -bits
            depths[lowest.bit_length() - 1] += amount
            bits ^= lowest
        return
    octets = np.frombuffer(bits.to_bytes((len(depths) + 7) // 8, "little"), dtype=np.uint8)
    depths += amount * np.unpackbits(octets, count=len(depths), bitorder="little")
