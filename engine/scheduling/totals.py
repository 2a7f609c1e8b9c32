"""What an engine has done since it started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Totals:
    """Running totals, which only grow; each is the field of :class:`engine.messages.EngineLoad` of the same name."""

    steps: int = 0
    busy_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    context_tokens: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
