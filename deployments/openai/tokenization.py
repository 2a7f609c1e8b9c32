"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import msgspec

from deployments.openai.errors import ApiError
from deployments.openai.generation import Engine
from deployments.openai.models import check_model
from deployments.openai.prompts import Prompts
from deployments.openai.requests.body import parse
from deployments.openai.requests.tokenization import Detokenize, TokenizeChat, TokenizeText
from engine.errors import RequestError
from engine.tokenizer import Tokenizer


class _Kind(msgspec.Struct):
    """What tells the two kinds of body apart."""

    messages: Any = None


async def tokenize(body: bytes, engine: Engine, prompts: Prompts) -> dict[str, Any]:
    """The token ids of a text, or of a conversation in the chat template.

    Raises:
        ApiError, RequestError: the body is malformed, or the template refuses the messages.
    """
    if _has_messages(body):
        chat = parse(TokenizeChat, body)
        check_model(engine.info, chat.model)
        ids = await prompts.tokenize_chat(chat, chat.tools or ())
        named = chat.return_token_strs
    else:
        text = parse(TokenizeText, body)
        check_model(engine.info, text.model)
        (ids,) = await prompts.tokenize([text.prompt], 1)
        named = text.return_token_strs
    return {
        "count": len(ids),
        "max_model_len": engine.info.max_model_len,
        "tokens": ids,
        "token_strs": [prompts.tokenizer.token_text(token_id)[0] for token_id in ids] if named else None,
    }


async def detokenize(body: bytes, engine: Engine, prompts: Prompts) -> dict[str, Any]:
    """The text of token ids.

    Raises:
        ApiError, RequestError: the body is malformed, or an id has no token.
    """
    request = parse(Detokenize, body)
    check_model(engine.info, request.model)
    size = prompts.tokenizer.used_vocab_size
    if wrong := next((token_id for token_id in request.tokens if token_id >= size), None):
        raise RequestError(f"tokens holds id {wrong}; the model's ids are 0 to {size - 1}", field="tokens")
    return {"prompt": prompts.tokenizer.decode(request.tokens)}


def tokenizer_info(engine: Engine, tokenizer: Tokenizer) -> dict[str, Any]:
    """What clients that tokenize through the server must know, such as lm-evaluation-harness."""
    template = tokenizer.chat_template
    return {
        **template.special_tokens,
        "chat_template": template.source,
        "model_max_length": engine.info.max_model_len,
        "vocab_size": tokenizer.used_vocab_size,
    }


def _has_messages(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Kind).messages is not None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The request body is not a JSON object: {error}", code="invalid_json") from None
