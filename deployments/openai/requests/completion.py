"""Body of ``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import PlainValidator, StrictBool, StrictStr, model_validator

from deployments.openai.fields import Int
from deployments.openai.requests.generation import GenerationRequest
from engine.errors import RequestError
from engine.sampling_params import MAX_CHOICES, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's ``max_tokens`` of a completion that names none."""


def _checked_prompt(value: Any) -> Any:
    """By hand, as a union of long lists would be tried, and complained about, member by member and item by item."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds <= {str} or kinds <= {int}:
            return value
        if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value):
            return value
    raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists")


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_checked_prompt)]


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    echo: StrictBool | None = None
    logprobs: Int | None = None
    best_of: Int | None = None
    suffix: StrictStr | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.suffix:
            raise RequestError("suffix (filling in the middle) is not supported; leave it out", field="suffix")
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise RequestError(f"best_of is {self.best_of}, less than n, {self.n or 1}", field="best_of")
            if self.best_of > MAX_CHOICES:
                raise RequestError(f"best_of is {self.best_of}; at most {MAX_CHOICES} are possible", field="best_of")
            if self.stream and self.best_of > (self.n or 1):
                raise RequestError("best_of can't be streamed: the best is known at the end", field="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens is 0, which makes sense with echo only", field="max_tokens")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, however the client put them: texts, or token ids.

        Raises:
            RequestError: the list is empty.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt is an empty list; it needs at least one text or token id", field="prompt")
        return [prompt] if isinstance(prompt[0], int) else prompt

    @property
    def echo_only(self) -> bool:
        """Whether no token is asked for. One is generated, and not shown: engines know no less."""
        return self.max_tokens == 0

    def sampling_params(self, defaults: Mapping[str, Any], structured_outputs: dict[str, Any] | None) -> SamplingParams:
        """The validated sampling options of every choice; as at OpenAI, 16 new tokens unless the client says more.

        ``n`` of them is ``best_of``, where that is more.

        Raises:
            RequestError: an option is out of range; ``field`` names it.
        """
        options = {"max_tokens": DEFAULT_COMPLETION_TOKENS, **defaults, **self.sampling_options(structured_outputs)}
        if self.echo_only:
            options["max_tokens"] = 1
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
            if self.echo:
                options["prompt_logprobs"] = max(self.logprobs, options.get("prompt_logprobs", 0))
        if self.best_of is not None and self.best_of > (self.n or 1):
            options["n"] = self.best_of
            options.setdefault("logprobs", 0)  # to choose by
        return SamplingParams.parse(**options)
