"""Keeping special tokens that users write apart from those that the template writes.

A user who writes ``<|end_of_sentence|>`` should get those letters, not the end of their turn. Encoding the message
apart from the template is not possible in general, since templates strip, split and join the strings they get. Instead
a guard, a character that occurs nowhere in the conversation, is put inside each special token's name in every string of
the conversation, and behind a beginning of one at a string's end, so that strings which the template joins can't
complete it. In the rendered text, names without the guard are then the template's own. The tokenizer splits at those,
takes the guards out of the rest and encodes it as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import RequestError

_GUARDS = range(0xF0000, 0xFFFFE)  # Supplementary Private Use Area-A: no text means anything by them


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """``value`` with every string in it, keys too, passed through ``function``."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        # A key that is an identifier is there for the template to look up.
        return {
            key if str(key).isidentifier() else map_strings(key, function): map_strings(item, function)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [map_strings(item, function) for item in value]
    return value


def unused_character(value: Any) -> str:
    """A character for a guard, which no string in ``value`` has.

    Raises:
        RequestError: field "messages": there is none left.
    """
    used: set[str] = set()

    def collect(text: str) -> str:
        if not text.isascii():
            used.update(text)
        return text

    map_strings(value, collect)
    for code in _GUARDS:
        if chr(code) not in used:
            return chr(code)
    raise RequestError("the messages use every private-use character; take some out", field="messages")


def protector(special_names: list[str], guard: str) -> Callable[[str], str]:
    """What puts ``guard`` into a string wherever it has, or might be joined to, one of ``special_names``."""
    names = sorted((name for name in special_names if len(name) > 1), key=len, reverse=True)
    if not names:
        return lambda text: text
    whole = re.compile("|".join(map(re.escape, names)))
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    longest = len(names[0]) - 1

    def protect(text: str) -> str:
        while whole.search(text):  # again, for names inside names
            text = whole.sub(lambda match: match[0][0] + guard + match[0][1:], text)
        if any(text[-length:] in beginnings for length in range(1, min(longest, len(text)) + 1)):
            text += guard
        return text

    return protect
