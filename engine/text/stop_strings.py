"""Finding stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for several strings at once, a character at a time, and knows how much of the end may be part of one.

    One Knuth-Morris-Pratt automaton for each string: its state is the length of the longest beginning of the string
    that the text ends with. So what is found does not depend on how the text is cut into pieces: the occurrence that
    is complete first; among those complete at the same character, the longest.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._automata = [_Automaton(string) for string in dict.fromkeys(strings)]

    def __bool__(self) -> bool:
        return bool(self._automata)

    def feed(self, character: str) -> str | None:
        """Take the next character of the text; the stop string that it completes, if any."""
        found: str | None = None
        for automaton in self._automata:
            if automaton.feed(character) and len(automaton.string) > len(found or ""):
                found = automaton.string
        return found

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max((automaton.state for automaton in self._automata), default=0)


class _Automaton:
    def __init__(self, string: str) -> None:
        self.string = string
        self.state = 0
        # _borders[i]: the longest proper beginning of the string that its first i characters also end with.
        self._borders = [0, 0]
        for character in string[1:]:
            length = self._borders[-1]
            while length and string[length] != character:
                length = self._borders[length]
            self._borders.append(length + (string[length] == character))

    def feed(self, character: str) -> bool:
        """Whether the string is complete with this character."""
        while self.state and self.string[self.state] != character:
            self.state = self._borders[self.state]
        if self.string[self.state] == character:
            self.state += 1
        if self.state < len(self.string):
            return False
        self.state = self._borders[self.state]
        return True
