"""Body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, model_validator

from deployments.openai.fields import Int
from deployments.openai.requests.conversation import Conversation
from deployments.openai.requests.generation import GenerationRequest
from deployments.openai.tools import Calling, ToolChoice
from engine.errors import RequestError
from engine.sampling_params import MAX_LOGPROBS, SamplingParams


class ChatRequest(Conversation, GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    include_reasoning: StrictBool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs")
        return self

    @property
    def calling(self) -> Calling:
        """What of the tools there is for this answer.

        Raises:
            RequestError: the fields of the tools contradict one another.
        """
        if self.tools is None and self.tool_choice is None:
            return Calling()
        return Calling.of(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    def sampling_params(self, defaults: Mapping[str, Any], structured_outputs: dict[str, Any] | None) -> SamplingParams:
        """The validated sampling options of every choice.

        Args:
            defaults: the model's own, for options that the client leaves open.
            structured_outputs: as :meth:`structure` and the tools together make it.

        Raises:
            RequestError: an option is out of range; ``field`` names it.
        """
        options = {**defaults, **self.sampling_options(structured_outputs)}
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return SamplingParams.parse(**options)
