"""Types of request fields, strict where JSON is, and bounded before anything long is looked at."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict


def _integral(value: Any) -> Any:
    """Let 5.0 pass for 5: some languages have only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def at_most(items: int) -> BeforeValidator:
    """Refuse a long list or object before its items are looked at: a million complaints cost seconds."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, dict)) and len(value) > items:
            raise ValueError(f"has {len(value)} items; at most {items} are allowed")
        return value

    return BeforeValidator(check)


Int = Annotated[int, Strict(), BeforeValidator(_integral)]
Number = Annotated[float, Strict()]
Listed = BeforeValidator(_listed)
"""One string stands for a list of one."""

Priority = Annotated[Int, Field(ge=-(2**31), lt=2**31)]
