"""What an assistant's message is made of, as a parser finds it in the model's text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The model calls a function, the ``index``-th of this message."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of that call's arguments: JSON as the model writes it."""

    index: int
    text: str


Part = Content | Thought | CallBegins | CallArguments
