"""Bodies of ``POST /tokenize`` and ``POST /detokenize``, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StrictBool, StrictStr

from deployments.openai.fields import at_most
from deployments.openai.requests.conversation import Conversation


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
