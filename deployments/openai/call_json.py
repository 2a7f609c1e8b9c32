"""Reading ``{"name": ..., "arguments": {...}}`` while it is being written."""

from __future__ import annotations

import json
from enum import Enum, auto

_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")
_BARE = frozenset('{}[],:+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n\r\t"')
"""What JSON (and the literals of Python that models write by mistake) has outside of strings."""


class _State(Enum):
    OPEN = auto()  # before the outer {
    KEY = auto()  # before or in a key, or before the outer }
    COLON = auto()
    VALUE = auto()
    DONE = auto()
    BROKEN = auto()


class CallReader:
    """The object of one tool call, read character by character.

    The name is known as soon as its value ends, and arguments are passed on as they come, in the model's own spelling;
    where they come before the name they wait for it. Arguments that are a string with JSON in it, as some models
    write them, are passed on as that JSON once they are complete.

    Attributes:
        name: the function's, once known.
        rest: text behind the object, or from where it can't be one.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.rest = ""
        self._state = _State.OPEN
        self._token = ""  # the key or value being read
        self._key = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._waiting: list[str] = []  # arguments that are not passed on yet
        self._any_arguments = False
        self._passing = False  # this value goes to the arguments as it comes

    @property
    def ended(self) -> bool:
        """Whether nothing more is read: the object is complete, or it is none."""
        return self._state in (_State.DONE, _State.BROKEN)

    def push(self, text: str) -> str:
        """Take in more text; returns what may be passed on of the arguments."""
        for position, character in enumerate(text):
            if not (self._in_string or character in _BARE):
                self._state = _State.BROKEN
            else:
                self._read(character)
            if self.ended:
                self.rest = text[position + (self._state is _State.DONE) :]
                break
        if self._state is _State.DONE and not self._any_arguments:
            self._any_arguments = True
            self._waiting.append("{}")
        if self.name is None:
            return ""
        ready = "".join(self._waiting)
        self._waiting.clear()
        return ready

    def _read(self, character: str) -> None:
        match self._state:
            case _State.OPEN:
                self._expect(character, "{", _State.KEY)
            case _State.KEY:
                self._read_key(character)
            case _State.COLON:
                self._expect(character, ":", _State.VALUE)
            case _State.VALUE:
                self._read_value(character)

    def _expect(self, character: str, wanted: str, state: _State) -> None:
        if character == wanted:
            self._state = state
        elif not character.isspace():
            self._state = _State.BROKEN

    def _read_key(self, character: str) -> None:
        if self._token:
            self._token += character
            self._scan(character)
            if not self._in_string:
                key = _loaded(self._token)
                self._key, self._token = str(key), ""
                self._state = _State.COLON if isinstance(key, str) else _State.BROKEN
        elif character == '"':
            self._token, self._in_string = character, True
        elif character == "}":
            self._state = _State.DONE if self.name is not None else _State.BROKEN
        elif not (character.isspace() or character == ","):
            self._state = _State.BROKEN

    def _read_value(self, character: str) -> None:
        if not self._token:
            if character.isspace():
                return
            if character in ",:}]":
                self._state = _State.BROKEN
                return
            self._passing = character == "{" and self._key in _ARGUMENTS and not self._any_arguments
            self._any_arguments |= self._passing
        elif not self._in_string and self._depth == 0:
            self._behind_value(character)
            return
        self._token = self._token + character if not self._passing else character
        self._scan(character)
        if self._passing:
            self._waiting.append(character)

    def _behind_value(self, character: str) -> None:
        """The value is complete, unless it is a number or a literal."""
        if character in ",}":
            self._end_value()
            if character == "}" and self._state is _State.KEY:
                self._state = _State.DONE if self.name is not None else _State.BROKEN
        elif not character.isspace():
            self._token += character
            if self._token[0] in '{["}':
                self._state = _State.BROKEN

    def _scan(self, character: str) -> None:
        """Keep count of strings and brackets."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _end_value(self) -> None:
        token, self._token = self._token, ""
        self._state = _State.KEY
        if self._passing:
            self._passing = False
        elif self._key == _NAME and self.name is None:
            name = _loaded(token)
            if isinstance(name, str) and name:
                self.name = name
            else:
                self._state = _State.BROKEN
        elif self._key in _ARGUMENTS and not self._any_arguments:
            self._any_arguments = True
            inner = _loaded(token)
            # Anything else but an object (null, mostly) stands for no arguments.
            self._waiting.append(inner if isinstance(inner, str) and isinstance(_loaded(inner), dict) else "{}")


def _loaded(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
