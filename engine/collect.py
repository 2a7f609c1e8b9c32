"""From deltas to outputs: what becomes of a prompt while its choices are under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import EngineRequest, TokenDelta, TokenLogprobs
from engine.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from engine.text.stream import TextStream
from engine.tokenizer import Tokenizer


@dataclass(slots=True)
class Choice:
    """One choice of a prompt, of which the engine gives a token at a time."""

    request: EngineRequest
    stream: TextStream
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str = ""
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0

    def take(self, delta: TokenDelta) -> bool:
        """Add the engine's delta; whether the choice is complete."""
        new = self.stream.push(delta)
        self.texts.append(new.text)
        self.token_ids += new.token_ids
        self.logprobs += new.logprobs or []
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if new.finish_reason is None:
            return False
        self.finish_reason, self.stop_reason = new.finish_reason.value, new.stop_reason
        return True

    def output(self, index: int) -> CompletionOutput:
        """What came of it; ``index`` is its place among the prompt's choices."""
        asked = self.request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self.texts),
            token_ids=self.token_ids,
            logprobs=self.logprobs if asked else None,
            cumulative_logprob=sum(entry.logprob for entry in self.logprobs) if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


@dataclass(slots=True)
class Job:
    """One prompt with its choices."""

    prompt: str | None
    prompt_token_ids: list[int]
    request_id: str = ""
    choices: list[Choice] = field(default_factory=list)

    def output(self, tokenizer: Tokenizer) -> RequestOutput:
        """What came of all its choices."""
        prompt_logprobs = self.choices[0].prompt_logprobs
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[choice.output(i) for i, choice in enumerate(self.choices)],
            num_cached_tokens=max(choice.num_cached_tokens for choice in self.choices),
            prompt_logprobs=None
            if prompt_logprobs is None
            else [None if entry is None else PositionLogprobs.of(entry, tokenizer) for entry in prompt_logprobs],
        )
