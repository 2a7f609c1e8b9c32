"""Token ids to text, piece by piece, equal to decoding them all at once."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from engine.tokenizer import Tokenizer


class Detokenizer:
    """Text of one sequence of generated tokens.

    Bytes of a character that is not complete yet are held until it is, or until bytes follow that can't complete it
    (then they become U+FFFD, as in :meth:`Tokenizer.decode`). Generated tokens go on after a prompt, so a leading space
    is theirs and stays.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))

    def finish(self) -> str:
        """What an unfinished character at the end comes to: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)
