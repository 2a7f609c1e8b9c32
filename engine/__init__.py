"""Dibit's engine: one model on one group of ranks, without Ray and without HTTP.

``LLM`` and ``SamplingParams`` are loaded when first used, so that importing a part of the engine (its messages, its
configuration) does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.llm import LLM as LLM
    from engine.sampling_params import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "engine.llm", "SamplingParams": "engine.sampling_params"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
