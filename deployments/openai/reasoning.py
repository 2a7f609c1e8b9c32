"""Telling a thinking model's thoughts from its answer.

The form is ``<think>`` thoughts ``</think>`` answer; templates of today write ``<think>`` at the end of the prompt. In
ERNIE-4.5's thinking models the answer stands in ``<response>`` ... ``</response>``, and a tool call in its place
(vLLM and FastDeploy read the same: their parsers ``ernie45`` and ``ernie-x1``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

from deployments.openai.markers import Trimmed, partial_length
from engine.tokenizer import Tokenizer

BEGIN = "<think>"
END = "</think>"
RESPONSE_BEGIN = "<response>"
RESPONSE_END = "</response>"

_TAIL = 16
"""Tokens at the end of a prompt in which ``<think>`` is looked for; spelled out in pieces it is at most seven."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model thinks aloud.

    Attributes:
        response: the answer stands in ``<response>`` tags.
    """

    response: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """The model's way, as its chat template or its vocabulary tell; None for a model that doesn't."""
        source = tokenizer.chat_template.source or ""

        def known(marker: str) -> bool:
            return marker in source or tokenizer.token_id(marker) is not None

        return cls(response=known(RESPONSE_BEGIN)) if known(END) else None

    @staticmethod
    def begun(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
        """Whether the prompt ends with the beginning of thoughts."""
        return tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(BEGIN)


class _State(Enum):
    UNDECIDED = auto()  # thoughts may come
    THINKING = auto()
    THOUGHT = auto()  # a response, or an answer without its tags, may come
    RESPONSE = auto()
    RESPONDED = auto()
    ANSWER = auto()


class ThoughtParser:
    """Splits one choice's text into (is it a thought, text) pieces, each given as soon as it is certain.

    White space around the thoughts and around a ``<response>`` is dropped. Thoughts come first or not at all.
    However the text is cut into pieces, the thoughts joined and the rest joined are the same.
    """

    def __init__(self, thinking: Thinking, *, begun: bool) -> None:
        self._response = thinking.response
        self._state = _State.THINKING if begun else _State.UNDECIDED
        self._held = ""
        self._trimmed = Trimmed()

    def push(self, text: str) -> list[tuple[bool, str]]:
        """Take in more text."""
        self._held += text
        pieces: list[tuple[bool, str]] = []
        while self._step(pieces):
            pass
        return [piece for piece in pieces if piece[1]]

    def finish(self) -> list[tuple[bool, str]]:
        """The text has ended: what was held back comes out."""
        rest, self._held = self._held, ""
        if self._state in (_State.THINKING, _State.RESPONSE):
            rest = self._trimmed.push(rest)
        elif self._state in (_State.THOUGHT, _State.RESPONDED):
            rest = rest.lstrip()
        return [(self._state is _State.THINKING, rest)] if rest else []

    def _step(self, pieces: list[tuple[bool, str]]) -> bool:
        """Go on by one state; False when more text is needed."""
        match self._state:
            case _State.UNDECIDED:
                return self._open(BEGIN, _State.THINKING, keep_space=True)
            case _State.THINKING:
                return self._until(END, _State.THOUGHT, pieces)
            case _State.THOUGHT:
                return self._open(RESPONSE_BEGIN if self._response else "", _State.RESPONSE)
            case _State.RESPONSE:
                return self._until(RESPONSE_END, _State.RESPONDED, pieces)
            case _State.RESPONDED:
                return self._open("", _State.ANSWER)
            case _State.ANSWER:
                pieces.append((False, self._held))
                self._held = ""
        return False

    def _open(self, marker: str, state: _State, *, keep_space: bool = False) -> bool:
        """Into ``state`` behind ``marker``, where that comes next; else to the answer."""
        text = self._held.lstrip()
        if marker and text.startswith(marker):
            self._state, self._held, self._trimmed = state, text[len(marker) :], Trimmed()
            return True
        if not text or (marker and marker.startswith(text)):
            return False
        self._state = _State.ANSWER
        if not keep_space:
            self._held = text
        return True

    def _until(self, marker: str, state: _State, pieces: list[tuple[bool, str]]) -> bool:
        """Give text up to ``marker``, and into ``state`` behind it."""
        text, found, rest = self._held.partition(marker)
        if not found:
            certain = len(text) - partial_length(text, marker)
            text, rest = text[:certain], text[certain:]
        pieces.append((self._state is _State.THINKING, self._trimmed.push(text)))
        self._held = rest
        if found:
            self._state = state
        return bool(found)
