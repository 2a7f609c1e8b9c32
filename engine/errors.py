"""The errors a user can cause, each with a message that says what was found, what was expected and what to do."""

from __future__ import annotations


class DibitError(Exception):
    """Base of every error Dibit raises on purpose; its text is meant for the user, without a traceback."""


class ConfigError(DibitError):
    """A model's config.json or an engine option is missing, malformed or contradicts another one."""


class UnsupportedError(DibitError):
    """An architecture, quantization or feature that Dibit does not have; the message lists what it has."""


class CheckpointError(DibitError):
    """A weight file is missing, truncated, renamed or holds a tensor of the wrong name, shape or dtype."""


class RequestError(DibitError):
    """A request that can't be served as asked.

    Attributes:
        field: name of the offending request field, as the client wrote it (``"max_tokens"``), or ``None``.
        code: OpenAI error code (``"context_length_exceeded"``), or ``None``.
    """

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code

    @classmethod
    def too_long(cls, num_prompt_tokens: int, max_tokens: int, *, limit: int, whose: str) -> RequestError:
        """A prompt and its answer don't fit into ``limit`` tokens.

        Args:
            whose: words before that number, such as "max_model_len is".
        """
        too_long = num_prompt_tokens >= limit
        remedy = "shorten the prompt" if too_long else f"ask for at most {limit - num_prompt_tokens} tokens"
        return cls(
            f"{num_prompt_tokens} prompt tokens and max_tokens={max_tokens} make {num_prompt_tokens + max_tokens}; "
            f"{whose} {limit} tokens: {remedy}",
            field="prompt" if too_long else "max_tokens",
            code="context_length_exceeded",
        )


class EngineDeadError(DibitError):
    """The engine stopped (a rank died or a step failed), or there is none; requests under way on it can't go on.

    Attributes:
        retry_after_s: seconds until there may be another one, as far as can be foreseen, or ``None``.
    """

    def __init__(self, message: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(DibitError):
    """There is more work than can be done in time; the request was not begun.

    Attributes:
        retry_after_s: seconds until it would be taken, as far as can be foreseen.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
