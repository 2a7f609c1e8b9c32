"""OpenTelemetry spans: who is whose parent, what is told, and that nothing is loaded where tracing is off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.directory import EngineAddress
from deployments.observability.config import TracingConfig
from deployments.observability.seeing import open_tracing
from deployments.observability.tracing import Tracing
from deployments.openai.http import send_json, until_disconnect
from deployments.routing import Replica
from engine.errors import ConfigError
from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ON = TracingConfig(endpoint="http://127.0.0.1:1/v1/traces")


def engine(replica_id: str) -> EngineAddress:
    return EngineAddress(
        spec=Replica(replica_id, "h20", 4096, 16, 100, 8, 256),
        model_path="/m",
        identity="0",
        actor_name="a",
        namespace="n",
        stalled_after_s=60,
        start_seconds=1,
    )


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id, [1, 2, 3], SamplingParams(), max_tokens=9)


class Endpoint:
    """Does with the observer what the endpoints and the client of the engines do."""

    def __init__(self, tracing: Tracing, *, choices: int = 1, fail_over: bool = False, status: int = 200) -> None:
        self._tracing = tracing
        self._choices = choices
        self._fail_over = fail_over
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await until_disconnect(receive, self._work(send))

    async def _work(self, send: Send) -> None:
        async with asyncio.TaskGroup() as group:
            for i in range(self._choices):
                group.create_task(self._generate(request(f"r{i}"), queued_s=0.01 * (i + 1)))
        await send_json(send, b"{}", status=self._status)

    async def _generate(self, one: EngineRequest, *, queued_s: float) -> None:
        observer = self._tracing
        observer.routed(one, engine("a"), predicted_ttft_s=0.1, cached_tokens=16)
        await asyncio.sleep(0)
        observer.first_token(engine("a"), ttft_s=0.5, predicted_ttft_s=0.1, queued_s=queued_s)
        if self._fail_over:
            observer.failed_over(engine("b"))
            observer.routed(one, engine("b"), predicted_ttft_s=0.1, cached_tokens=16)
        await asyncio.sleep(0)
        observer.finished(one, engine("b"), reason="stop", e2e_s=1.0, ttft_s=0.5, tokens=4)


def serve(headers: dict[str, str] | None = None, *, ratio: float = 1.0, **options: Any) -> list[ReadableSpan]:
    """The spans of one request."""
    exporter = InMemorySpanExporter()
    config = TracingConfig(endpoint=ON.endpoint, sample_ratio=ratio)
    tracing = Tracing(config, exporter=exporter)
    app = Starlette(routes=[Route("/v1/completions", Endpoint(tracing, **options), methods=["POST"])])

    async def post() -> None:
        transport = httpx.ASGITransport(tracing.around(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/v1/completions", json={}, headers=headers or {})
        await tracing.close()

    asyncio.run(post())
    return list(exporter.get_finished_spans())


def named(spans: list[ReadableSpan], name: str) -> ReadableSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_is_a_tree_of_spans_under_the_clients() -> None:
    spans = serve({"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"})
    http, generate = named(spans, "POST /v1/completions"), named(spans, "generate")
    assert http.parent is not None
    assert format(http.parent.span_id, "016x") == SPAN_ID
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE_ID}
    assert generate.parent is not None
    assert generate.parent.span_id == http.context.span_id
    for name in ("route", "queue", "prefill", "decode"):
        part = named(spans, name)
        assert part.parent is not None
        assert part.parent.span_id == generate.context.span_id
        assert seconds(part) >= 0
    assert seconds(generate) == pytest.approx(1.0, abs=1e-6)
    assert seconds(named(spans, "decode")) == pytest.approx(0.5, abs=1e-6)
    parts = [seconds(named(spans, name)) for name in ("route", "queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(1.0, abs=1e-6)
    assert http.attributes is not None
    assert http.attributes["http.response.status_code"] == 200
    assert generate.attributes is not None
    assert generate.attributes["gen_ai.usage.input_tokens"] == 3
    assert generate.attributes["gen_ai.usage.output_tokens"] == 4
    assert generate.attributes["dibit.replica"] == "a"


def test_a_failover_is_an_event() -> None:
    generate = named(serve(fail_over=True), "generate")
    assert [event.name for event in generate.events] == ["routed", "failover", "routed"]
    assert [(event.attributes or {}).get("dibit.replica") for event in generate.events] == ["a", None, "b"]
    assert generate.attributes is not None
    assert generate.attributes["dibit.replica"] == "b"


def test_choices_of_one_request_are_kept_apart() -> None:
    spans = serve(choices=3)
    assert sum(span.name == "generate" for span in spans) == 3
    assert len({span.context.span_id for span in spans if span.name == "queue"}) == 3


def test_what_the_client_does_not_sample_is_not_traced() -> None:
    assert serve({"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}) == []
    assert serve(ratio=0.0) == []


def test_a_failure_of_ours_is_marked() -> None:
    assert not named(serve(status=503), "POST /v1/completions").status.is_ok


def test_spans_reach_a_collector() -> None:
    received: list[ExportTraceServiceRequest] = []
    tokens: list[str | None] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            tokens.append(self.headers["x-token"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        config = TracingConfig(endpoint=endpoint, service_name="here", headers={"x-token": "t"})
        tracing = Tracing(config, application="app")
        app = tracing.around(Starlette(routes=[Route("/v1/completions", Endpoint(tracing), methods=["POST"])]))

        async def post() -> None:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                await client.post("/v1/completions", json={})
            await tracing.close()

        try:
            asyncio.run(post())
        finally:
            collector.shutdown()
            thread.join()
    spans = [span for one in received for r in one.resource_spans for s in r.scope_spans for span in s.spans]
    assert {"POST /v1/completions", "generate", "queue", "prefill", "decode"} <= {span.name for span in spans}
    resource = {a.key: a.value.string_value for a in received[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "here"
    assert resource["dibit.application"] == "app"
    assert tokens[0] == "t"


def test_off_imports_nothing() -> None:
    code = (
        "import sys; from deployments.observability.config import TracingConfig;"
        "from deployments.observability.seeing import open_tracing;"
        "assert open_tracing(TracingConfig(), application='a') is None;"
        "sys.exit('deployments.observability.tracing' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_configured_but_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deployments.observability.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'dibit\[tracing\]'"):
        open_tracing(ON, application="a")


@pytest.mark.parametrize("wrong", ["collector:4318", "ftp://collector", ""])
def test_an_endpoint_is_a_url(wrong: str) -> None:
    with pytest.raises(ValidationError, match="endpoint"):
        TracingConfig(endpoint=wrong)
