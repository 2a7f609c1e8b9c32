"""The text of one choice as it grows: tokens in, text out.

What is sent can't be taken back, so text is held while it may still change or be cut off: bytes of an unfinished
character, and an end that may be the beginning of a stop string. The texts of all deltas joined are the text that
decoding all tokens at once and cutting at the stop string gives, however the tokens are split into deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.messages import FinishReason, TokenDelta
from engine.outputs import PositionLogprobs
from engine.sampling_params import SamplingParams
from engine.text.detokenizer import Detokenizer
from engine.text.stop_strings import StopStrings
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of one choice.

    Attributes:
        text: may be empty while text is held back.
        token_ids: new tokens, a stop token included. Their text may come with a later delta.
        logprobs: one entry for each of ``token_ids``, where asked for.
        finish_reason: set on the last delta.
        stop_reason: as :class:`engine.outputs.CompletionOutput` has it.
    """

    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class TextStream:
    """Turns one choice's :class:`TokenDelta` objects into :class:`TextDelta` objects.

    A stop string counts once at least ``min_tokens`` tokens exist: an occurrence that is complete earlier is ignored.
    Of several stop strings the one that is complete first ends the text, at its first character (or behind its last
    with ``include_stop_str_in_output``). The token that completes it is the last that counts: tokens behind it in the
    same delta are dropped, and whoever drives the stream aborts the request when a delta's ``finish_reason`` is set
    while the engine's was not.

    Attributes:
        num_tokens: tokens so far, with the stop token or the tokens of the stop string: ``completion_tokens`` of the
            usage.
        finished: the last delta is out; further pushes (steps already under way) give empty deltas.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(params.stop)
        self._held = ""
        self.num_tokens = 0
        self.finished = False

    def push(self, delta: TokenDelta) -> TextDelta:
        """Take the engine's next tokens."""
        if self.finished:
            return TextDelta("", [])
        tokens = delta.token_ids
        is_last = delta.finish_reason is not None
        # The stop token is no part of the text, even where it is an ordinary token.
        shown = tokens[:-1] if delta.stop_token_id is not None else tokens
        if self._stops:
            text, stop, count = self._push_until_stop(shown, is_last=is_last)
        else:
            text = self._detokenizer.push(shown) + (self._detokenizer.finish() if is_last else "")
            stop, count = None, len(shown)
        if stop is not None:
            self.num_tokens += count
            self.finished = True
            return TextDelta(text, tokens[:count], self._named(delta, count), FinishReason.STOP, stop)
        self.num_tokens += len(tokens)
        self.finished = is_last
        stop_reason = delta.stop_token_id if delta.stop_token_id in self._params.stop_token_ids else None
        return TextDelta(text, tokens, self._named(delta, len(tokens)), delta.finish_reason, stop_reason)

    def finish(self, reason: FinishReason = FinishReason.ABORT) -> TextDelta:
        """End the text from outside (client gone, engine dead): what was held comes out, nothing is looked for."""
        if self.finished:
            return TextDelta("", [])
        self.finished = True
        text, self._held = self._held + self._detokenizer.finish(), ""
        return TextDelta(text, [], finish_reason=reason)

    def _push_until_stop(self, tokens: Sequence[int], *, is_last: bool) -> tuple[str, str | None, int]:
        """Text to send, the stop string found, and how many of ``tokens`` it took."""
        ready: list[str] = []
        for count, token in enumerate(tokens, start=1):
            text, stop = self._advance(self._detokenizer.push((token,)), self.num_tokens + count)
            ready.append(text)
            if stop is not None:
                return "".join(ready), stop, count
        if is_last:
            text, stop = self._advance(self._detokenizer.finish(), self.num_tokens + len(tokens))
            ready += [text, self._held]
            self._held = ""
            if stop is not None:
                return "".join(ready), stop, len(tokens)
        return "".join(ready), None, len(tokens)

    def _advance(self, text: str, num_tokens: int) -> tuple[str, str | None]:
        """Look for stop strings in ``text``, which exists once there are ``num_tokens`` tokens."""
        for i, character in enumerate(text):
            stop = self._stops.feed(character)
            if stop is not None and num_tokens >= self._params.min_tokens:
                seen = self._held + text[: i + 1]
                self._held = ""
                return seen if self._params.include_stop_str_in_output else seen[: -len(stop)], stop
        seen = self._held + text
        border = len(seen) - self._stops.held
        self._held = seen[border:]
        return seen[:border], None

    def _named(self, delta: TokenDelta, count: int) -> list[PositionLogprobs] | None:
        if delta.logprobs is None:
            return None
        return [PositionLogprobs.of(entry, self._tokenizer) for entry in delta.logprobs[:count]]
