"""A conversation, as chat requests and ``/tokenize`` take it."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, StrictBool, StrictStr, model_validator

from deployments.openai.requests.messages import Messages
from deployments.openai.tools import Tools
from engine.errors import RequestError

_TEMPLATE_ARGUMENTS = {"self", "messages", "special_names", "add_generation_prompt", "tools"}


class Conversation(BaseModel):
    """Messages, and what the chat template is to make of them."""

    messages: Messages
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
