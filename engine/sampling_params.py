"""How the next token is chosen, validated once."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.errors import RequestError

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_LOGIT_BIAS = 1024


def _listed(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class SamplingParams(BaseModel):
    """Sampling options under OpenAI's and vLLM's names; frozen, and wrong ones can't be made.

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1 means all tokens. ``seed`` None draws one. ``logprobs`` is the number
    of most likely tokens to report at each position (0: only the chosen one; None: no log probabilities at all).
    Noise is a pure function of (seed, position, token), so equal requests with equal seeds give equal tokens.
    ``min_tokens`` holds off EOS, ``stop_token_ids`` and ``stop`` strings until that many tokens exist.
    What each option does to the logits, and in which order: :mod:`engine.execution.sampler`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_k: int = Field(default=0, ge=-1)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIAS
    )
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    stop: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str]) -> list[str]:
        for text in stop:
            if not text:
                raise ValueError("a stop string must not be empty")
            if len(text) > MAX_STOP_LENGTH:
                raise ValueError(f"a stop string has {len(text)} characters; at most {MAX_STOP_LENGTH} are allowed")
        return stop

    @model_validator(mode="after")
    def _check_lengths(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})")
        return self

    @classmethod
    def parse(cls, **options: Any) -> SamplingParams:
        """Make parameters from untrusted options.

        Raises:
            RequestError: an option is unknown or out of range; ``field`` names it.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # the options contradict one another
                raise RequestError(first["msg"].removeprefix("Value error, "), field="min_tokens") from None
            name = str(first["loc"][0])
            found = repr(first["input"])[:80]
            raise RequestError(f"{name}: {first['msg']} (found {found})", field=name) from None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0
