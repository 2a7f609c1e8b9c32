"""An engine that a shard can run without a model: its tokens are known beforehand."""

from __future__ import annotations

from collections.abc import Container

from engine.messages import EngineLoad, EngineRequest, FinishReason, StepOutput, TokenDelta


def true_token(seed: int | None, position: int) -> int:
    """The token that a request has at a position of its output, whatever it shares an engine with."""
    return 100 + (position * position + 7 * (seed or 0)) % 89


class ToyEngine:
    """What a shard needs of its engine; knows which requests it has."""

    def __init__(self) -> None:
        self._requests: dict[str, EngineRequest] = {}
        self._generated: dict[str, int] = {}
        self._steps = 0
        self.has_had: set[str] = set()
        """Ids of all requests, ever."""

    @property
    def ids(self) -> set[str]:
        """Of the requests under way."""
        return set(self._requests)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(0, len(self._requests), 0, 100, 100, steps=self._steps, step_seconds=0.01)

    def submit(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            if request.request_id in self.has_had:
                raise AssertionError(f"{request.request_id} came twice")
            self.has_had.add(request.request_id)
            self._requests[request.request_id] = request
            self._generated[request.request_id] = len(request.output_token_ids)

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def step(self, *, passed_over: Container[int] = ()) -> StepOutput:
        """A token for each request, in the order of their arrival, but for some."""
        self._steps += 1
        deltas = []
        for number, (request_id, request) in enumerate(list(self._requests.items())):
            if number in passed_over:
                continue
            position = self._generated[request_id]
            self._generated[request_id] += 1
            last = position + 1 == request.max_tokens
            reason = FinishReason.LENGTH if last else None
            deltas.append(TokenDelta(request_id, [true_token(request.params.seed, position)], reason))
            if last:
                del self._requests[request_id]
        return StepOutput(deltas, self.load)
