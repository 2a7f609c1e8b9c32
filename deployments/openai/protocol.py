"""What clients may send: OpenAI's chat and completion requests, with the extra options of vLLM and FastDeploy.

Types are checked here and ranges in :class:`engine.sampling_params.SamplingParams`, so each rule stands in one place.
Fields that nobody here knows are ignored, as OpenAI does, and counted; those that would change the answer are refused
(:mod:`deployments.openai.unsupported`). ``docs/api.md`` lists them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from deployments.openai.errors import from_validation
from deployments.openai.fields import Int, Listed, Number, Priority, at_most
from deployments.openai.messages import Message
from deployments.openai.structure import Choices, ResponseFormat, Schema, Structure, StructuredOutputs, structure_of
from deployments.openai.tools import Calling, ToolChoice, Tools
from deployments.openai.unsupported import check_unsupported, count_unknown
from engine.errors import RequestError
from engine.sampling_params import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams

Model = TypeVar("Model", bound=BaseModel)

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
    "prompt_logprobs",
)

_TEMPLATE_ARGUMENTS = {"self", "messages", "special_names", "add_generation_prompt", "tools"}

_GUIDED_FIELDS = (
    "guided_json",
    "guided_json_object",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structural_tag",
)


def parse(model: type[Model], body: bytes) -> Model:
    """Validate a request body.

    Raises:
        ApiError: it isn't JSON, or a field has the wrong type; the field is named.
        RequestError: it asks for something that isn't there, or contradicts itself.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


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

    def sampling_options(self) -> dict[str, Any]:
        """The sampling options that the client gave, under :class:`SamplingParams`' names."""
        return {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}


class Conversation(BaseModel):
    """Messages, and what the chat template is to make of them."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool | None = None
    documents: list[dict[str, Any]] | None = None
    enable_thinking: StrictBool | None = None
    reasoning_effort: StrictStr | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_variables(self) -> Self:
        taken = sorted(_TEMPLATE_ARGUMENTS & (self.chat_template_kwargs or {}).keys())
        if taken:
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(taken)}, which the server does",
                field="chat_template_kwargs",
            )
        return self

    def template_variables(self) -> dict[str, Any]:
        """Variables for the chat template, besides messages and tools."""
        variables: dict[str, Any] = {}
        if self.documents:
            variables["documents"] = self.documents
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                variables["enable_thinking"] = False
        # FastDeploy's elder place for it; OpenAI's metadata are strings, which mean nothing here.
        if isinstance(thinking := (self.metadata or {}).get("enable_thinking"), bool):
            variables["enable_thinking"] = thinking
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        return variables | (self.chat_template_kwargs or {})


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
        options = {**defaults, **self.sampling_options()}
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return _params(options, structured_outputs)


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
        options = {"max_tokens": DEFAULT_COMPLETION_TOKENS, **defaults, **self.sampling_options()}
        if self.echo_only:
            options["max_tokens"] = 1
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
            if self.echo:
                options["prompt_logprobs"] = max(self.logprobs, options.get("prompt_logprobs", 0))
        if self.best_of is not None and self.best_of > (self.n or 1):
            options["n"] = self.best_of
            options.setdefault("logprobs", 0)  # to choose by
        return _params(options, structured_outputs)


def _params(options: dict[str, Any], structured_outputs: dict[str, Any] | None) -> SamplingParams:
    if structured_outputs is not None:
        options["structured_outputs"] = structured_outputs
    return SamplingParams.parse(**options)


class Tokenize(BaseModel):
    """What bodies of ``POST /tokenize`` have in common; vLLM's shape."""

    model: StrictStr | None = None
    return_token_strs: StrictBool | None = None


class TokenizeText(Tokenize):
    """A text to tokenize."""

    prompt: StrictStr


class TokenizeChat(Conversation, Tokenize):
    """A conversation to tokenize."""


class Detokenize(BaseModel):
    """Body of ``POST /detokenize``; vLLM's shape."""

    model: StrictStr | None = None
    tokens: Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**63)]], at_most(1 << 20)]
