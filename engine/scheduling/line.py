"""Requests in the order in which they are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from engine.scheduling.request import Request

_order = attrgetter("order")


class Line:
    """Requests in ascending :attr:`Request.order`, which no two share.

    A sorted list: to insert or remove moves what is behind, which for thousands of pointers takes a microsecond.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        insort(self._requests, request, key=_order)

    def remove(self, request: Request) -> None:
        """Take a request out.

        Raises:
            ValueError: it isn't here.
        """
        at = bisect_left(self._requests, request.order, key=_order)
        if at == len(self._requests) or self._requests[at] is not request:
            raise ValueError(f"request {request.request_id!r} is not in line")
        del self._requests[at]

    @property
    def first(self) -> Request:
        """Whose turn it is; there must be one."""
        return self._requests[0]

    @property
    def last(self) -> Request:
        """Who comes after all others; there must be one."""
        return self._requests[-1]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)
