"""From prompts to choices ready to run: chat template, tokens, bounds."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from deployments.openai.generation import Choice
from engine.errors import RequestError
from engine.requests import expand
from engine.sampling_params import SamplingParams
from engine.text import TextStream
from engine.tokenizer import Tokenizer

P = ParamSpec("P")
R = TypeVar("R")

MAX_CHOICES_PER_REQUEST = 1024
"""Prompts times ``n`` of one HTTP request; a batch this size belongs in several."""

_LONG_TEXT = 4096
"""Characters above which tokenizing (about 1 us each) would hold up the streams of others, so a thread does it."""


def new_id(prefix: str) -> str:
    """An id no other answer has, of any ingress."""
    return f"{prefix}-{uuid.uuid4().hex}"


class Prompts:
    """Turns what clients send into engine requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

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

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            RequestError: the template refuses the messages.
        """
        length = sum(len(str(message.get("content"))) for message in messages)
        return await _in_thread_if_long(length, self._encode_chat, messages, options)

    def choices(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        max_model_len: int,
        *,
        request_id: str,
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
            Choice(index=index, request=request, text_stream=TextStream(self.tokenizer, request.params))
            for index, request in enumerate(requests)
        ]

    def _encode(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        return [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True, **options)


async def _in_thread_if_long(length: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    if length > _LONG_TEXT:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)
