"""An engine without a model: what it generates is a pure function of the request, at once or when it is let."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from engine.errors import RequestError
from engine.messages import EngineRequest, FinishReason, TokenDelta, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Model:
    served_model_name: str = "tiny"
    max_model_len: int = 256
    created: int = 1_700_000_000


MODEL = Model()


class SyntheticEngine:
    """Answers with random tokens, a few in each delta.

    Attributes:
        open: requests go on while it is set.
        running: requests under way.
        most: how many there were at once.
    """

    def __init__(self, *, vocab_size: int, most_tokens: int = 8) -> None:
        self.info = MODEL
        self._vocab_size = vocab_size
        self._most_tokens = most_tokens
        self.open = asyncio.Event()
        self.open.set()
        self.running = 0
        self.most = 0

    def healthy(self) -> bool:
        return True

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if not request.prompt_token_ids:
                raise RequestError("the prompt has no tokens", field="prompt")
            for delta in self._deltas(request):
                await self.open.wait()
                yield delta
                await asyncio.sleep(0)
        finally:
            self.running -= 1

    def _deltas(self, request: EngineRequest) -> list[TokenDelta]:
        dice = random.Random(request.params.seed)
        left = min(request.max_tokens, self._most_tokens)
        deltas = []
        while left:
            tokens = [dice.randrange(self._vocab_size) for _ in range(min(left, dice.randint(1, 3)))]
            left -= len(tokens)
            wanted = request.params.logprobs
            deltas.append(
                TokenDelta(
                    request.request_id,
                    tokens,
                    finish_reason=None if left else FinishReason.LENGTH,
                    logprobs=None if wanted is None else [self._logprobs(token, wanted) for token in tokens],
                    prompt_logprobs=None if deltas else self._of_prompt(request),
                )
            )
        return deltas

    def _of_prompt(self, request: EngineRequest) -> list[TokenLogprobs | None] | None:
        wanted = getattr(request.params, "prompt_logprobs", None)
        if wanted is None:
            return None
        return [None, *(self._logprobs(token, wanted) for token in request.prompt_token_ids[1:])]

    def _logprobs(self, token: int, wanted: int) -> TokenLogprobs:
        top: Mapping[int, float] = {(token + offset) % self._vocab_size: -1.0 - offset for offset in range(wanted)}
        return TokenLogprobs(token, -1.0, 1, dict(top))
