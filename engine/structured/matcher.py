"""Where one request is in its grammar."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import xgrammar

from engine.errors import RequestError

Words = npt.NDArray[np.int32]
"""A set of tokens: token ``t`` is in it if bit ``t % 32`` of word ``t // 32`` is set."""


class Matcher:
    """Follows a request's tokens through a grammar.

    Args:
        compiled: the grammar, which is shared.
        vocab_size: ids below this have a token.
        token_ids: tokens generated elsewhere already.

    Raises:
        RequestError: those tokens are no beginning of a sentence of the grammar, or a whole one and its end.
    """

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int, token_ids: Sequence[int] = ()) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._words = -(-vocab_size // 32)
        # XGrammar says nothing of the bits of the last word that stand for no token.
        self._padding = np.int32(-1 << vocab_size % 32 if vocab_size % 32 else 0)
        for position, token_id in enumerate(token_ids):
            if self.ended or not self.accept(token_id):
                raise RequestError(
                    f"output token {position} (id {token_id}) does not go on as structured_outputs demands; "
                    "continue only what was generated under the same constraint",
                    field="structured_outputs",
                )

    @property
    def ended(self) -> bool:
        """Whether the end was accepted: nothing may follow."""
        return self._matcher.is_terminated()

    def allowed(self, *, unwelcome: Collection[int] = ()) -> Words | None:
        """The tokens that may come next, EOS among them where the grammar may end, special ones never.

        Args:
            unwelcome: tokens to leave out, unless nothing else may come.

        Returns:
            A new array, or None if no token goes on: the grammar has no sentence that begins so.
        """
        words = np.empty((1, self._words), dtype=np.int32)
        self._matcher.fill_next_token_bitmask(words)
        row: Words = words[0]
        row[-1] &= ~self._padding
        if unwelcome:
            welcome = row.copy()
            bits = welcome.view(np.uint32)
            for token_id in unwelcome:
                if 0 <= token_id < 32 * self._words:
                    bits[token_id // 32] &= ~np.uint32(1 << (token_id % 32))
            row = welcome if welcome.any() else row
        return row if row.any() else None

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing has changed, if it isn't allowed."""
        return self._matcher.accept_token(token_id)
