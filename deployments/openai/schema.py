"""``GET /openapi.json``: the API described for machines, from the very models that check its requests."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from deployments.openai.models import installed_version
from deployments.openai.requests.chat import ChatRequest
from deployments.openai.requests.completion import CompletionRequest
from deployments.openai.requests.tokenization import Detokenize, TokenizeChat, TokenizeText
from deployments.openai.sse import encode

_REFERENCE = "#/components/schemas/{model}"

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One path and method; one of ``bodies`` checks its request."""

    method: str
    path: str
    summary: str
    bodies: tuple[type[BaseModel], ...] = ()
    streams: bool = False


OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation", (ChatRequest,), streams=True),
    Operation("post", "/v1/completions", "Continue prompts", (CompletionRequest,), streams=True),
    Operation(
        "post", "/tokenize", "Count and show the tokens of a text or a conversation", (TokenizeText, TokenizeChat)
    ),
    Operation("post", "/detokenize", "The text of token ids", (Detokenize,)),
    Operation("get", "/tokenizer_info", "What the tokenizer is"),
    Operation("get", "/v1/models", "List the models that are served"),
    Operation("get", "/v1/models/{model}", "Describe a model"),
    Operation("get", "/health", "Whether some engine makes progress"),
    Operation("get", "/ready", "Whether requests can be served"),
    Operation("get", "/version", "The version of the server"),
)


@functools.cache
def encoded(model: str) -> bytes:
    """The description as JSON, for the one model that is served."""
    return encode(describe(model))


def describe(model: str) -> dict[str, Any]:
    """The OpenAPI 3.1 description of the API.

    Args:
        model: name of the model that is served, given as an example.
    """
    bodies = [(body, "validation") for operation in OPERATIONS for body in operation.bodies]
    _, definitions = models_json_schema(bodies, ref_template=_REFERENCE)  # type: ignore[arg-type]  # a list of literals
    schemas = dict(definitions.get("$defs", {}), Error=_ERROR)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, model)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Dibit",
            "version": installed_version(),
            "description": "OpenAI's API over the models that this server runs.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],  # whether keys are needed is the operator's choice
    }


def _operation(operation: Operation, model: str) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {}}
    if operation.streams:
        content["text/event-stream"] = {}
    refusal = {
        "description": "What is wrong, in OpenAI's shape",
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}},
    }
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "Done", "content": content}, "4XX": refusal, "5XX": refusal},
    }
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": model}
        ]
    if operation.bodies:
        kinds = [{"$ref": _REFERENCE.format(model=body.__name__)} for body in operation.bodies]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described
