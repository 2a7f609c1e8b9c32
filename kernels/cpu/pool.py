"""Threads that help if they can: what they and their caller do, compiled; see `kernels.cpu.threads`.

The state they share is an array of int64, each on a cache line of its own: a ticket, which is odd while there is work;
the number of helpers inside; the work, a kernel and its argument; and how many helpers may take part. A helper goes in
before it looks whether the ticket still stands, and the caller takes the ticket back before it looks whether anybody is
inside, so that one of them sees the other. Nobody waits for a helper that has not begun.
"""

from __future__ import annotations

from typing import Any

from numba import cfunc, types

from kernels.cpu.words import add, call, load, longs_at, pause

TICKET, INSIDE, KERNEL, ARGUMENT, LIMIT, WIDTH = 0, 8, 16, 17, 18, 24


def work(version: str, *, cache: bool) -> Any:
    """Run kernels, with the help of who comes."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def work(address: Any) -> None:
        """State, number of kernels, for each its address, its argument and how many helpers may take part. Counters of
        tasks, the first thing at each argument, start anew."""
        _ = version
        p = longs_at(address)
        state = longs_at(p[0])
        for i in range(2, 2 + 3 * p[1], 3):
            longs_at(p[i + 1])[0] = 0
            if p[i + 2] == 0:
                call(p[i], p[i + 1])
                continue
            state[KERNEL], state[ARGUMENT], state[LIMIT] = p[i], p[i + 1], p[i + 2]
            add(p[0] + 8 * TICKET, 1)
            call(p[i], p[i + 1])
            add(p[0] + 8 * TICKET, 1)
            while load(p[0] + 8 * INSIDE):
                pause()

    return work


def serve(version: str, *, cache: bool) -> Any:
    """Help with what comes, until nothing has come for a while."""

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def serve(address: Any) -> None:
        """State, which helper this is, how often to look in vain."""
        _ = version
        p = longs_at(address)
        state = longs_at(p[0])
        last, idle = 0, 0
        while idle < p[2]:
            ticket = load(p[0] + 8 * TICKET)
            if ticket & 1 and ticket != last:
                last, idle = ticket, 0
                add(p[0] + 8 * INSIDE, 1)
                if load(p[0] + 8 * TICKET) == ticket and p[1] < state[LIMIT]:
                    call(state[KERNEL], state[ARGUMENT])
                add(p[0] + 8 * INSIDE, -1)
            else:
                pause()
                idle += 1

    return serve
