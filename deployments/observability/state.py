"""The live state of the cluster as JSON: what ``GET /state`` answers and the page draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from deployments.directory import EngineAddress
from deployments.observability.registry import Histogram
from engine.messages import EngineLoad

FRESH_S = 0.5
"""Age up to which a state is sent again, so that many viewers cost no more than one."""


class RatesView(Protocol):
    """What was learned of an engine's speed, in seconds; see :class:`deployments.routing.rates.Rates`."""

    @property
    def step(self) -> float:
        """Of any step."""

    @property
    def prefill(self) -> float:
        """For each prompt token computed."""

    @property
    def decode(self) -> float:
        """For each token sampled."""


class EngineView(Protocol):
    """One engine as an ingress sees it."""

    @property
    def address(self) -> EngineAddress:
        """Where it is, and what it can hold."""

    @property
    def load(self) -> EngineLoad | None:
        """Of the last step heard of; None before the first."""

    @property
    def rates(self) -> RatesView | None:
        """Learned rates; None while nothing is known."""

    @property
    def ready(self) -> bool:
        """Whether it takes new requests."""

    @property
    def retired(self) -> bool:
        """Whether it only finishes what it has."""

    @property
    def silent_s(self) -> float:
        """Seconds since it was last heard."""


class ServedModelView(Protocol):
    """What the page says of the model."""

    @property
    def served_model_name(self) -> str:
        """The name that clients ask for."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens."""


class StateSource(Protocol):
    """Where the state comes from: ``deployments.client.EngineClient``."""

    @property
    def info(self) -> ServedModelView:
        """What is served."""

    @property
    def held(self) -> int:
        """Requests that wait for an engine to come up."""

    def engines(self) -> Sequence[EngineView]:
        """All engines known, ready or not."""


def word(engine: EngineView) -> str:
    """An engine's state in one word: ready, draining, or lost (also: not yet there)."""
    if engine.retired:
        return "draining"
    return "ready" if engine.ready else "lost"


class StateEncoder:
    """The state as bytes, made anew at most twice a second.

    Args:
        source: the engines.
        ingress: name of this ingress process.
        latencies: histograms to show, summed over their series, by the name that the page knows.
        pools: names of the configured pools, which are shown also while they have no replica.
        experts: tokens of each expert, by pool and layer.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        source: StateSource,
        *,
        ingress: str = "local",
        latencies: Mapping[str, Histogram] | None = None,
        pools: Sequence[str] = (),
        experts: Callable[[], Mapping[str, Mapping[int, Sequence[int]]]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._ingress = ingress
        self._latencies = dict(latencies or {})
        self._pools = tuple(pools)
        self._experts = experts
        self._clock = clock
        self._encoded: dict[bool, tuple[float, bytes]] = {}

    def __call__(self, *, experts: bool) -> bytes:
        """JSON, UTF-8; with ``experts``, the tokens of each expert too, which are many numbers in a large model."""
        now = self._clock()
        made, encoded = self._encoded.get(experts, (float("-inf"), b""))
        if now - made >= FRESH_S:
            state = self._state()
            if experts:
                state["experts"] = self._expert_tokens()
            encoded = msgspec.json.encode(state)
            self._encoded[experts] = (now, encoded)
        return encoded

    def _state(self) -> dict[str, Any]:
        info = self._source.info
        pools: dict[str, list[dict[str, Any]]] = {name: [] for name in self._pools}
        for engine in sorted(self._source.engines(), key=lambda engine: engine.address.replica_id):
            pools.setdefault(engine.address.pool, []).append(_replica(engine))
        return {
            "model": {"name": info.served_model_name, "max_model_len": info.max_model_len},
            "ingress": self._ingress,
            "held": self._source.held,
            "pools": [{"name": name, "replicas": replicas} for name, replicas in pools.items()],
            "latency": {name: _distribution(histogram) for name, histogram in self._latencies.items()},
        }

    def _expert_tokens(self) -> dict[str, Any]:
        pools = self._experts() if self._experts is not None else {}
        return {
            pool: {"layers": list(layers), "tokens": [list(tokens) for tokens in layers.values()]}
            for pool, layers in sorted(pools.items())
        }


def _replica(engine: EngineView) -> dict[str, Any]:
    spec, load, rates = engine.address.spec, engine.load, engine.rates
    replica: dict[str, Any] = {
        "id": spec.replica_id,
        "state": word(engine),
        "silent_s": round(min(engine.silent_s, 1e9), 2),  # JSON has no infinity
        "max_num_seqs": spec.max_num_seqs,
        "block_size": spec.block_size,
        "max_model_len": spec.max_model_len,
    }
    if load is not None:
        replica["load"] = {
            "running": load.running_requests,
            "waiting": load.waiting_requests,
            "waiting_prefill_tokens": load.waiting_prefill_tokens,
            "free_blocks": load.free_blocks,
            "total_blocks": load.total_blocks,
            "steps": load.steps,
            "step_s": load.step_seconds,
            "prefill_tokens": load.prefill_tokens,
            "decode_tokens": load.decode_tokens,
            "queried_tokens": load.queried_tokens,
            "cached_tokens": load.cached_tokens,
            "preemptions": load.preemptions,
        }
    if rates is not None:
        replica["rates"] = {"step_s": rates.step, "prefill_s": rates.prefill, "decode_s": rates.decode}
    return replica


def _distribution(histogram: Histogram) -> dict[str, Any]:
    counts = [0] * (len(histogram.bounds) + 1)
    for series in histogram.series.values():
        counts = [a + b for a, b in zip(counts, series.counts, strict=True)]
    return {"bounds": histogram.bounds, "counts": counts}
