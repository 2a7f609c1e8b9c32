"""Looking for markers such as ``</think>`` in text that comes in pieces."""

from __future__ import annotations


def partial_length(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker`` without completing it."""
    start = text.find(marker[0], max(len(text) - len(marker) + 1, 0))
    while start >= 0:
        if marker.startswith(text[start:]):
            return len(text) - start
        start = text.find(marker[0], start + 1)
    return 0


class Trimmed:
    """Text without white space at its beginning and end, as it grows: an end is held until something follows it."""

    def __init__(self) -> None:
        self._begun = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take in more text; returns what is certain."""
        if not self._begun:
            text = text.lstrip()
            if not text:
                return ""
            self._begun = True
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept
