"""From a chat request to a job: messages and tools become tokens, a grammar, and a way to read the answer."""

from __future__ import annotations

import asyncio
from typing import Any

from deployments.openai.answer import Job, in_clients_words
from deployments.openai.chat import ChatFormat
from deployments.openai.generation import Engine
from deployments.openai.models import check_model
from deployments.openai.parsed_chat import ParsedChatFormat
from deployments.openai.prompts import Prompts, new_id
from deployments.openai.reasoning import Thinking
from deployments.openai.requests.body import parse
from deployments.openai.requests.chat import ChatRequest
from deployments.openai.shape import Shape
from engine.errors import RequestError


async def prepare_chat(body: bytes, engine: Engine, prompts: Prompts) -> Job:
    """Validate a request body down to tokens.

    Raises:
        ApiError, RequestError: the request can't be served as asked.
    """
    request = parse(ChatRequest, body)
    prompts.observer.ignored_fields(request.unknown_fields)
    check_model(engine.info, request.model)
    answer_id = new_id("chatcmpl")
    calling = request.calling
    token_ids = await prompts.tokenize_chat(request, calling.tools)
    begun = prompts.thinking is not None and Thinking.begun(token_ids, prompts.tokenizer)
    shape = Shape(calling, prompts.dialect, thinking=prompts.thinking, begun=begun)
    structure = request.structure
    structure_field = "tools" if structure is None else structure.field
    structured_outputs = None
    if structure is not None or calling.mode != "none":
        structured_outputs = await asyncio.to_thread(shape.structured_outputs, structure)
    try:
        params = request.sampling_params(prompts.sampling_defaults, structured_outputs)
        choices = prompts.choices(
            [token_ids],
            params,
            engine.info.max_model_len,
            request_id=answer_id,
            priority=request.priority or 0,
        )
    except RequestError as error:
        field = "messages" if error.field == "prompt" else error.field
        raise in_clients_words(RequestError(str(error), field=field, code=error.code), structure_field) from None
    options: dict[str, Any] = {
        "answer_id": answer_id,
        "model": engine.info.served_model_name,
        "num_choices": len(choices),
        "logprobs": params.logprobs is not None,
        "include_usage": request.include_usage,
        "continuous_usage": request.continuous_usage,
    }
    form = (
        ChatFormat(**options)
        if shape.plain
        else ParsedChatFormat(shape=shape, include_reasoning=request.include_reasoning is not False, **options)
    )
    return Job(
        choices=choices,
        choices_per_prompt=params.n,
        format=form,
        stream=bool(request.stream),
        structure_field=structure_field,
    )
