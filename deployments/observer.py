"""What happens to requests and engines, told to whoever measures it."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

from deployments.directory import EngineAddress
from engine.messages import EngineLoad, EngineRequest

SPAN: ContextVar[object | None] = ContextVar("span", default=None)
"""The trace of the HTTP request that is being served, if it is traced. The observer finds it here, as all it hears of a
request is called in the context of the task that serves it."""


class Observer:
    """Hears of every event in the life of a request, and of every engine's load; this one ignores them all.

    Called on the ingress's event loop, in the hot path: an observer only counts.
    """

    def routed(
        self, request: EngineRequest, engine: EngineAddress, *, predicted_ttft_s: float, cached_tokens: int
    ) -> None:
        """The router has chosen an engine for a request."""

    def refused(self, reason: str) -> None:
        """A request was turned away, with one word why: ``overloaded``, ``rate_limit``, ``unauthorized``, ..."""

    def first_token(self, engine: EngineAddress, *, ttft_s: float, predicted_ttft_s: float, queued_s: float) -> None:
        """A request's first token has come, ``ttft_s`` after it was given to the client of the engines."""

    def finished(
        self, request: EngineRequest, engine: EngineAddress, *, reason: str, e2e_s: float, ttft_s: float, tokens: int
    ) -> None:
        """A request has ended after ``tokens`` output tokens; ``reason`` is its finish reason or ``abort``."""

    def failed_over(self, engine: EngineAddress) -> None:
        """An engine was lost, and a request that was under way there goes on elsewhere."""

    def loaded(self, engine: EngineAddress, load: EngineLoad) -> None:
        """A step's load of an engine was heard."""

    def ignored_fields(self, count: int) -> None:
        """A request body had so many fields that nobody here knows."""


class Observers(Observer):
    """Tells several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def routed(
        self, request: EngineRequest, engine: EngineAddress, *, predicted_ttft_s: float, cached_tokens: int
    ) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.routed(request, engine, predicted_ttft_s=predicted_ttft_s, cached_tokens=cached_tokens)

    def refused(self, reason: str) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.refused(reason)

    def first_token(self, engine: EngineAddress, *, ttft_s: float, predicted_ttft_s: float, queued_s: float) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.first_token(engine, ttft_s=ttft_s, predicted_ttft_s=predicted_ttft_s, queued_s=queued_s)

    def finished(
        self, request: EngineRequest, engine: EngineAddress, *, reason: str, e2e_s: float, ttft_s: float, tokens: int
    ) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.finished(request, engine, reason=reason, e2e_s=e2e_s, ttft_s=ttft_s, tokens=tokens)

    def failed_over(self, engine: EngineAddress) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.failed_over(engine)

    def loaded(self, engine: EngineAddress, load: EngineLoad) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.loaded(engine, load)

    def ignored_fields(self, count: int) -> None:
        """See :class:`Observer`."""
        for observer in self._observers:
            observer.ignored_fields(count)
