"""What clients may send: OpenAI's chat and completion requests, with vLLM's extra sampling options.

Types are checked here and ranges in :class:`engine.sampling_params.SamplingParams`, so each rule stands in one place.
Fields that are not listed are ignored, as clients send many; those that would change the answer are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from deployments.openai.errors import from_validation
from engine.errors import RequestError
from engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams


def _integral(value: Any) -> Any:
    """Let 5.0 pass for 5: some languages have only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _at_most(items: int) -> BeforeValidator:
    """Refuse a long list or object before its items are looked at: a million complaints cost seconds."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, dict)) and len(value) > items:
            raise ValueError(f"has {len(value)} items; at most {items} are allowed")
        return value

    return BeforeValidator(check)


Int = Annotated[int, Strict(), BeforeValidator(_integral)]
Number = Annotated[float, Strict()]

MAX_CONTENT_PARTS = 1024
"""Pieces of text in one message."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's ``max_tokens`` of a completion that names none."""

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
)


_TEMPLATE_ARGUMENTS = {"self", "messages", "special_names", "add_generation_prompt"}


class StreamOptions(BaseModel):
    """``stream_options`` of a streaming request."""

    include_usage: StrictBool | None = None


class GenerationRequest(BaseModel):
    """What chat and completion requests have in common. ``None`` means OpenAI's default."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

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
    logit_bias: Annotated[dict[str, Number], _at_most(MAX_LOGIT_BIAS)] | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    stop: Annotated[list[StrictStr], BeforeValidator(_listed), _at_most(MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[StrictInt], _at_most(MAX_STOP_STRINGS)] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    seed: Int | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Validate a request body.

        Raises:
            ApiError: it isn't JSON, or a field has the wrong type; the field is named.
            RequestError: it asks for something that isn't there, or contradicts itself.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error) from None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", field="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_options(self) -> dict[str, Any]:
        """The sampling options that the client gave, under :class:`SamplingParams`' names."""
        return {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}


class TextPart(BaseModel):
    """A piece of a message's content; models here read text only."""

    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[StrictStr | list[TextPart] | None, _at_most(MAX_CONTENT_PARTS)] = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: in a role they know."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(), "role": role}


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs")
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise RequestError(f"{name}: calling tools is not supported; leave the field out", field=name)
        taken = sorted(_TEMPLATE_ARGUMENTS & (self.chat_template_kwargs or {}).keys())
        if taken:
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(taken)}, which the server does",
                field="chat_template_kwargs",
            )
        _check_response_format(self.response_format)
        return self

    def sampling_params(self) -> SamplingParams:
        """The validated sampling options of every choice.

        Raises:
            RequestError: an option is out of range; ``field`` names it.
        """
        options = self.sampling_options()
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return SamplingParams.parse(**options)


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
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.suffix:
            raise RequestError("suffix (filling in the middle) is not supported; leave it out", field="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(
                f"best_of is {self.best_of} and n is {self.n or 1}; choosing the best of more is not supported, so "
                "best_of must equal n or be left out",
                field="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo with logprobs needs log probabilities of the prompt, which are not supported; drop one",
                field="logprobs",
            )
        _check_response_format(self.response_format)
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

    def sampling_params(self) -> SamplingParams:
        """The validated sampling options of every choice; as at OpenAI, 16 new tokens unless the client says more.

        Raises:
            RequestError: an option is out of range; ``field`` names it.
        """
        options = {"max_tokens": DEFAULT_COMPLETION_TOKENS, **self.sampling_options()}
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
        return SamplingParams.parse(**options)


def _check_response_format(response_format: dict[str, Any] | None) -> None:
    if response_format and response_format.get("type", "text") != "text":
        raise RequestError(
            f"response_format of type {response_format['type']!r} is not supported; only 'text' is",
            field="response_format",
        )
