"""What is wrong in a configuration, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def mistakes(error: ValidationError, section: type[BaseModel]) -> str:
    """All of them, each with the path of its field; for an unknown option, the one that may be meant.

    Args:
        error: of validating `section`.
        section: the options that there are.
    """
    problems = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "no such option" + _suggestion(item["loc"], section)
        elif item["type"] not in ("value_error", "missing") and not _is_hidden(item["loc"], section):
            message += f" (found {item['input']!r:.80})"
        problems.append(f"{path}: {message}" if path else message)
    return "; ".join(problems)


def _is_hidden(path: Sequence[int | str], section: type[BaseModel]) -> bool:
    """Whether a value belongs to a section that shows none in errors of its own either, as it may be a secret."""
    entered = [section]
    for part in path:
        field = entered[-1].model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            entered += list(_sections(field.annotation))[:1]
    return any(inner.model_config.get("hide_input_in_errors", False) for inner in entered)


def _suggestion(path: Sequence[int | str], section: type[BaseModel]) -> str:
    for part in path[:-1]:
        if isinstance(part, str):
            field = section.model_fields.get(part)
            inner = next(_sections(field.annotation), None) if field is not None else None
            if inner is None:
                return ""
            section = inner
    close = get_close_matches(str(path[-1]), section.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections of options that a field may hold, in lists or beside other types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
