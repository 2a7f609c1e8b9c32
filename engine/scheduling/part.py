"""A request's part of a step."""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: compute ``all_token_ids[start : start + num_new_tokens]``."""

    request: Request
    num_new_tokens: int
    start: int
    samples: bool
    """Whether these are the last tokens known, so that the step yields the next one."""
    num_prompt_rows: int = 0
    """Of so many of these tokens, from the first on, the logits are wanted for log probabilities of the prompt."""

    @classmethod
    def next(cls, request: Request, num_new_tokens: int) -> ScheduledRequest:
        """The first so many tokens that are not computed yet."""
        start = request.num_computed_tokens
        end = start + num_new_tokens
        num_prompt_rows = 0
        if request.prompt_logprobs is not None and request.wants_prompt_logprobs:
            num_prompt_rows = max(0, min(end, len(request.prompt_token_ids) - 1) - start)
        return cls(request, num_new_tokens, start, end == request.num_tokens, num_prompt_rows)

    @property
    def end(self) -> int:
        """So many tokens of the request are computed after the step."""
        return self.start + self.num_new_tokens

    @property
    def prefills(self) -> bool:
        """Whether these are tokens that were known when the request began to run."""
        return self.start < self.request.prefill_end
