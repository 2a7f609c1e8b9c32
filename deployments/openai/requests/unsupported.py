"""Fields of other servers that are not implemented here: those that do no harm, and those that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import RequestError

IGNORED: dict[str, str] = {
    "user": "for whom the request is",
    "safety_identifier": "for whom the request is",
    "store": "nothing is stored",
    "service_tier": "there is one",
    "prompt_cache_key": "equal prefixes are found by themselves",
    "prompt_cache_retention": "equal prefixes are found by themselves",
    "prediction": "makes nothing faster here",
    "verbosity": "a wish to OpenAI's own models",
    "metadata": "tags for OpenAI's storage",
    "request_id": "answers have an id of their own; see X-Request-Id",
    "add_special_tokens": "texts are tokenized as they are",
    "spaces_between_special_tokens": "special tokens have no text",
    "guided_decoding_backend": "there is one",
    "guided_whitespace_pattern": "white space in JSON is free",
    "max_streaming_response_tokens": "streams pace themselves",
    "length_penalty": "for beam search",
}
"""Known fields that make no difference, and why."""

REFUSED: dict[str, str] = {
    "functions": "deprecated; send tools",
    "function_call": "deprecated; send tool_choice",
    "audio": "models here write text only",
    "web_search_options": "there is no search",
    "use_beam_search": "there is no beam search; best_of chooses among samples",
    "chat_template": "a template is part of the model; chat_template_kwargs sets its variables",
    "continue_final_message": "send the text as the prompt of a completion",
    "mm_processor_kwargs": "models here read text only",
    "truncate_prompt_tokens": "prompts are never cut; count with /tokenize first",
    "allowed_token_ids": "logit_bias or a grammar can do it",
    "bad_words": "logit_bias can do it",
    "bad_words_token_ids": "logit_bias can do it",
    "logits_processors": "no code is taken from requests",
    "prompt_embeds": "prompts are texts or token ids",
    "return_tokens_as_token_ids": "tokens go by their texts",
    "return_token_ids": "count and read tokens with /tokenize",
    "cache_salt": "the prefix cache is shared by all who use this server",
    "kv_transfer_params": "engines here keep their own cache",
    "thinking_token_budget": "thoughts can't be bounded; max_completion_tokens bounds thoughts and answer together",
    "reasoning_max_tokens": "thoughts can't be bounded; max_completion_tokens bounds thoughts and answer together",
    "logprob_token_ids": "ask for logprobs",
    "repetition_detection": "stop and max_tokens end an answer",
}
"""Fields whose neglect would change the answer or break a promise, and what to do instead."""

_NOTHING = (None, False, "", 0)


def check_unsupported(extra: Mapping[str, Any]) -> None:
    """Refuse fields that can't be honoured, unless they ask for nothing.

    Raises:
        RequestError: naming the field.
    """
    for name in extra.keys() & REFUSED.keys():
        value = extra[name]
        if value not in _NOTHING and value != [] and value != {} and not (name == "function_call" and value == "none"):
            raise RequestError(f"{name} is not supported: {REFUSED[name]}", field=name)
    if extra.get("skip_special_tokens") is False:
        raise RequestError(
            "skip_special_tokens: special tokens are never shown; leave it out", field="skip_special_tokens"
        )


def count_unknown(extra: Mapping[str, Any]) -> int:
    """How many fields are neither known nor refused."""
    return len(extra.keys() - IGNORED.keys() - REFUSED.keys() - {"skip_special_tokens"})
