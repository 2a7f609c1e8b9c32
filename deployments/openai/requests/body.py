"""From the bytes of a request body to the model of its kind."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from deployments.openai.errors import from_validation

Model = TypeVar("Model", bound=BaseModel)


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
