"""The one model that is served, in OpenAI's shape, and by what."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from deployments.openai.errors import ApiError
from deployments.openai.generation import ServedModel


def model_card(info: ServedModel) -> dict[str, Any]:
    """A model as ``/v1/models`` lists it; ``max_model_len`` is vLLM's addition."""
    return {
        "id": info.served_model_name,
        "object": "model",
        "created": info.created,
        "owned_by": "dibit",
        "max_model_len": info.max_model_len,
    }


def check_model(info: ServedModel, name: str | None) -> None:
    """Refuse requests for a model that isn't served; a request may leave the name out.

    Raises:
        ApiError: 404, ``model_not_found``.
    """
    if name is not None and name != info.served_model_name:
        raise ApiError(
            404,
            f"The model {name!r:.200} does not exist; this server has {info.served_model_name!r}",
            param="model",
            code="model_not_found",
        )


def installed_version() -> str:
    """This package's version; "0" in a checkout that is not installed."""
    try:
        return metadata.version("dibit")
    except metadata.PackageNotFoundError:
        return "0"
