"""The section ``observability`` of ``serve_config.yaml``'s ``args``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TracingConfig(_Section):
    """Where OpenTelemetry spans go; needs the extra ``tracing`` (``pip install 'dibit[tracing]'``)."""

    model_config = ConfigDict(hide_input_in_errors=True)  # of headers

    endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")
    """The whole URL of an OTLP/HTTP collector, such as ``http://otel-collector:4318/v1/traces``; None is off."""
    service_name: str = Field(default="dibit", min_length=1)
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced. What a client's ``traceparent`` says goes before it."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent with each export, for a collector that wants a token."""


class ObservabilityConfig(_Section):
    """What there is to see of an application from outside."""

    metrics: bool = True
    """``GET /metrics``, and the same numbers through Ray's exporter."""
    page: bool = True
    """``GET /``, a page to try the model and to watch the cluster."""
    state: bool = True
    """``GET /state``, the JSON that the page draws. Pools, loads and addresses are no secrets among one's own clients;
    turn it off where strangers have keys."""
    expert_load_period_s: float = Field(default=5.0, gt=0)
    """How often engines that count the tokens of each expert (``engine.expert_load``) are asked for the counts."""
    tracing: TracingConfig = TracingConfig()
