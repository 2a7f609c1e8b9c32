"""From prompts to choices ready to run: chat template, tokens, bounds."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from deployments.observer import Observer
from deployments.openai.calls import dialect, dialect_of
from deployments.openai.generation import Choice
from deployments.openai.reasoning import Thinking
from deployments.openai.requests.conversation import Conversation
from deployments.openai.tools import Tool
from engine.errors import RequestError
from engine.requests import expand
from engine.sampling_params import SamplingParams
from engine.text.stream import TextStream
from engine.tokenizer import Tokenizer

P = ParamSpec("P")
R = TypeVar("R")

MAX_CHOICES_PER_REQUEST = 1024
"""Prompts times ``n`` of one HTTP request; a batch this size belongs in several."""

_LONG_TEXT = 4096
"""Characters above which tokenizing (about 1 us each) would hold up the streams of others, so a thread does it."""

_PIECE = 16
"""What the template adds to a piece of text takes as long as so many characters."""


def new_id(prefix: str) -> str:
    """An id no other answer has, of any ingress."""
    return f"{prefix}-{uuid.uuid4().hex}"


class Prompts:
    """Turns what clients send into engine requests.

    Args:
        observer: hears of fields that nobody knows.
        sampling_defaults: the model's own sampling options (:func:`engine.sampling_params.default_sampling`).
        tool_call_parser: a name out of :data:`deployments.openai.calls.DIALECTS`, instead of the one that the chat
            template tells of.

    Raises:
        ConfigError: there is no parser of that name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        observer: Observer | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        tool_call_parser: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.observer = observer or Observer()
        self.sampling_defaults = dict(sampling_defaults or {})
        self.thinking = Thinking.of(tokenizer)
        self.dialect = dialect(tool_call_parser) if tool_call_parser else dialect_of(tokenizer.chat_template)

    async def tokenize(self, prompts: Sequence[str] | Sequence[list[int]], choices_per_prompt: int) -> list[list[int]]:
        """Token ids of each prompt; those that are ids already pass.

        Raises:
            RequestError: there are too many prompts, or one holds no text.
        """
        if len(prompts) * choices_per_prompt > MAX_CHOICES_PER_REQUEST:
            raise RequestError(
                f"{len(prompts)} prompts with n={choices_per_prompt} make {len(prompts) * choices_per_prompt} choices; "
                f"one request may have {MAX_CHOICES_PER_REQUEST}",
                field="prompt",
            )
        length = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await _in_thread_if_long(length, self._encode, prompts)

    async def tokenize_chat(self, request: Conversation, tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            RequestError: the template refuses the messages.
        """
        messages = [message.for_template() for message in request.messages]
        variables = request.template_variables()
        if tools:
            variables["tools"] = [tool.for_template() for tool in tools]
        if request.add_generation_prompt is not None:
            variables["add_generation_prompt"] = request.add_generation_prompt
        contents = [message["content"] or "" for message in messages]
        pieces = [piece for content in contents for piece in ([content] if isinstance(content, str) else content)]
        length = sum(_PIECE + len(piece if isinstance(piece, str) else piece["text"]) for piece in pieces)
        return await _in_thread_if_long(length, self.tokenizer.encode_chat, messages, **variables)

    def choices(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        max_model_len: int,
        *,
        request_id: str,
        priority: int = 0,
    ) -> list[Choice]:
        """``params.n`` choices for each prompt, in order, everything about them checked.

        Raises:
            RequestError: a prompt or a parameter is out of bounds.
        """
        requests = [
            request
            for number, prompt in enumerate(prompts)
            for request in expand(
                prompt,
                params,
                max_model_len=max_model_len,
                request_id=f"{request_id}.{number}",
                used_vocab_size=self.tokenizer.used_vocab_size,
            )
        ]
        return [
            Choice(
                index=index,
                request=replace(request, priority=priority) if priority else request,
                text_stream=TextStream(self.tokenizer, request.params),
                tokenizer=self.tokenizer,
            )
            for index, request in enumerate(requests)
        ]

    def _encode(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        return [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


async def _in_thread_if_long(length: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    if length > _LONG_TEXT:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)
