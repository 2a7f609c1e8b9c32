"""What chat and completion requests have in common: how to sample, how to stream, and what shape the answer has."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr, model_validator

from deployments.openai.fields import Int, Listed, Number, Priority, at_most
from deployments.openai.requests.unsupported import check_unsupported, count_unknown
from deployments.openai.structure import Choices, ResponseFormat, Schema, Structure, StructuredOutputs, structure_of
from engine.errors import RequestError
from engine.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_STRINGS

# Options that SamplingParams takes under the same name.
_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "seed",
    "prompt_logprobs",
)

_GUIDED_FIELDS = (
    "guided_json",
    "guided_json_object",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structural_tag",
)


class StreamOptions(BaseModel):
    """``stream_options`` of a streaming request."""

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class GenerationRequest(BaseModel):
    """What chat and completion requests have in common. ``None`` means OpenAI's default."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="allow")

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    n: Int | None = None
    temperature: Number | None = None
    top_k: Int | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], at_most(MAX_LOGIT_BIAS)] | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    stop: Annotated[list[StrictStr], Listed, at_most(MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[StrictInt], at_most(MAX_STOP_STRINGS)] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    seed: Int | None = None
    prompt_logprobs: Int | None = None
    priority: Priority | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_json_object: StrictBool | None = None
    guided_regex: StrictStr | None = None
    guided_choice: Choices | None = None
    guided_grammar: StrictStr | None = None
    structural_tag: Schema | None = None

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        check_unsupported(self.model_extra or {})
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", field="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not available in a stream; leave one out", field="prompt_logprobs")
        return self

    @property
    def unknown_fields(self) -> int:
        """How many of its fields nobody here knows."""
        return count_unknown(self.model_extra or {})

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream holds the counts so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats and self.include_usage)

    @property
    def structure(self) -> Structure | None:
        """What the answer must look like.

        Raises:
            RequestError: the fields that say so contradict one another.
        """
        guided = {name: value for name in _GUIDED_FIELDS if (value := getattr(self, name)) is not None}
        if not guided and self.response_format is None and self.structured_outputs is None:
            return None
        return structure_of(self.response_format, self.structured_outputs, guided)

    def sampling_options(self, structured_outputs: dict[str, Any] | None) -> dict[str, Any]:
        """The sampling options that the client gave, and what the answer is held to, as ``SamplingParams`` names them.

        Args:
            structured_outputs: as :meth:`structure` and the tools together make it.
        """
        options = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        return options if structured_outputs is None else {**options, "structured_outputs": structured_outputs}
