"""OpenTelemetry spans of requests: HTTP, routing, waiting in the engine, prefill and decode.

Imported only where tracing is configured (:func:`deployments.observability.open_tracing`), as it needs the extra
``tracing``. The spans inside an engine's part of a request are made at its end, from times that were noted on the way.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.directory import EngineAddress
from deployments.observability.config import TracingConfig
from deployments.observer import SPAN, Observer
from engine.messages import EngineRequest

NANOSECONDS = 1_000_000_000
_HEADERS = ("traceparent", "tracestate")


@dataclass(slots=True)
class _Run:
    """An engine request under way."""

    parent: Context
    routed_ns: int
    queued_s: float = 0.0
    attributes: dict[str, str | int | float] = field(default_factory=dict)
    events: list[tuple[str, int, dict[str, str | int | float]]] = field(default_factory=list)


_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)
"""The run that this task is following."""


class Tracing(Observer):
    """Makes the spans of requests, as middleware around the application and as an observer of the engines.

    Args:
        config: with an endpoint.
        application: Serve's name of the application.
        exporter: where spans go instead of the configured endpoint.
    """

    def __init__(
        self, config: TracingConfig, *, application: str = "dibit", exporter: SpanExporter | None = None
    ) -> None:
        resource = Resource.create({"service.name": config.service_name, "dibit.application": application})
        self._provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)))
        exporter = exporter or OTLPSpanExporter(endpoint=config.endpoint, headers=config.headers or None)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dibit")
        self._propagator = TraceContextTextMapPropagator()
        self._runs: dict[str, _Run] = {}

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, with a span around each request that makes an engine work, continuing the client's trace."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            await self._serve(app, scope, receive, send=send)

        return traced

    async def close(self) -> None:
        """Send what is left."""
        await asyncio.to_thread(self._provider.shutdown)

    def flush(self) -> None:
        """Send what there is now, and wait for it."""
        self._provider.force_flush()

    def routed(
        self, request: EngineRequest, engine: EngineAddress, *, predicted_ttft_s: float, cached_tokens: int
    ) -> None:
        """Begin to follow a request, or note where it goes on."""
        run = self._runs.get(request.request_id)
        now = time.time_ns()
        if run is None:
            span = SPAN.get()
            if not isinstance(span, Span) or not span.is_recording():
                return
            run = self._runs[request.request_id] = _Run(trace.set_span_in_context(span), now)
        _RUN.set(run)
        run.attributes = {"dibit.pool": engine.pool, "dibit.replica": engine.replica_id}
        choice = {**run.attributes, "dibit.predicted_ttft": predicted_ttft_s, "dibit.cached_tokens": cached_tokens}
        run.events.append(("routed", now, choice))

    def first_token(self, engine: EngineAddress, *, ttft_s: float, predicted_ttft_s: float, queued_s: float) -> None:
        """Note how long the request waited in its engine."""
        if (run := _RUN.get()) is not None:
            run.queued_s = queued_s

    def failed_over(self, engine: EngineAddress) -> None:
        """Note that the request goes on elsewhere."""
        if (run := _RUN.get()) is not None:
            run.events.append(("failover", time.time_ns(), {}))

    def finished(
        self, request: EngineRequest, engine: EngineAddress, *, reason: str, e2e_s: float, ttft_s: float, tokens: int
    ) -> None:
        """Make the spans."""
        run = self._runs.pop(request.request_id, None)
        if run is None:
            return
        _RUN.set(None)
        end = time.time_ns()
        start = end - int(e2e_s * NANOSECONDS)
        first = min(end, start + int(ttft_s * NANOSECONDS)) if tokens else end
        routed = min(max(run.routed_ns, start), first)
        scheduled = min(routed + int(run.queued_s * NANOSECONDS), first)
        # The names of OpenTelemetry's conventions for generative models, where they have one.
        attributes = {
            **run.attributes,
            "gen_ai.operation.name": "text_completion",
            "gen_ai.response.id": request.request_id,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.output_tokens": tokens,
            "gen_ai.response.finish_reasons": [reason],
        }
        span = self._tracer.start_span("generate", run.parent, attributes=attributes, start_time=start)
        for name, at, details in run.events:
            span.add_event(name, details, at)
        if reason == "error":
            span.set_status(StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        for name, begin, until in (
            ("route", start, routed),
            ("queue", routed, scheduled),
            ("prefill", scheduled, first),
            ("decode", first, end),
        ):
            self._tracer.start_span(name, inside, start_time=begin).end(until)
        span.end(end)

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, *, send: Send) -> None:
        path = scope["path"]
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name.decode("latin-1") in _HEADERS
        }
        parent = self._propagator.extract(headers, context=Context())
        attributes = {"http.request.method": scope["method"], "url.path": path}
        span = self._tracer.start_span("POST", parent, kind=SpanKind.SERVER, attributes=attributes)

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        token = SPAN.set(span)
        try:
            await app(scope, receive, note)
        except Exception:
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            SPAN.reset(token)
            # Only a path that has a route becomes a name; anything else may be any text.
            route = getattr(scope.get("route"), "path", None)
            span.update_name(f"POST {route}" if route else "POST")
            span.end()
