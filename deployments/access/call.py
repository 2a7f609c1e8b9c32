"""One HTTP request on its way through: what is known of it, what it holds, and what is said about it at its end."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import Message, Scope, Send

from deployments.access.keys import ApiKey
from deployments.access.limits import KeyLimits, Slots
from deployments.openai.answer import Job
from deployments.openai.generation import Choice

CALL = "dibit.call"
"""Where the ASGI scope of a request has its :class:`Call`."""

CLIENT_GONE = 499
"""What the log gives as the status of a request whose client left before the answer began; nginx's number."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

Admit = Callable[["Call", Job], None]


class Call:
    """A request from its headers to its last byte.

    Args:
        admit: asked once the prompt is known; raises to refuse.
        request_id: the client's, if it gave one that can be trusted in a log.
        fields: headers that every answer gets.
    """

    __slots__ = (
        "_admit",
        "_extra",
        "_send",
        "choices",
        "choices_per_prompt",
        "complete",
        "first_body",
        "key",
        "limits",
        "model",
        "refused",
        "request_id",
        "slots",
        "started",
        "status",
        "stream",
    )

    def __init__(self, send: Send, admit: Admit, *, request_id: str, fields: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._admit = admit
        self._extra = fields
        self.request_id = request_id
        self.started = time.monotonic()
        self.key: ApiKey | None = None
        self.limits: KeyLimits | None = None
        self.slots: list[Slots] = []
        self.model: str | None = None
        self.stream = False
        self.choices: Sequence[Choice] = ()
        self.choices_per_prompt = 1
        self.status: int | None = None
        self.first_body: float | None = None
        self.complete = False
        self.refused: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; each counts once, however many choices it has."""
        return sum(len(choice.request.prompt_token_ids) for choice in self.choices[:: self.choices_per_prompt])

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(choice.text_stream.num_tokens for choice in self.choices)

    async def send(self, message: Message) -> None:
        """The ``send`` of everything further in: adds the headers, and sees what the log tells."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            limits = self.limits.headers(now=time.monotonic()) if self.limits is not None else []
            message = {**message, "headers": [*message.get("headers", ()), *self._extra, *limits]}
        else:
            if self.first_body is None:
                self.first_body = time.monotonic()
            self.complete = not message.get("more_body", False)
        await self._send(message)

    def admit(self, job: Job) -> None:
        """Take in a request that has been validated, before anything of it is computed.

        Raises:
            ApiError: its prompt is too long, or its key has no tokens left.
        """
        self._admit(self, job)
        self.stream = job.stream
        self.choices = job.choices
        self.choices_per_prompt = job.choices_per_prompt

    def end(self) -> None:
        """Give back what it holds, and charge what it has used."""
        duration_s = time.monotonic() - self.started
        for slots in self.slots:
            slots.release(duration_s)
        if self.limits is not None and self.choices:
            self.limits.add_output(self.output_tokens)

    def fields(self) -> dict[str, Any]:
        """What the log says of it."""
        now = time.monotonic()
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "key": None if self.key is None else self.key.name,
            "key_id": None if self.key is None else self.key.id,
            "model": self.model,
            "status": CLIENT_GONE if self.status is None else self.status,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": sum(choice.num_cached_tokens for choice in self.choices[:: self.choices_per_prompt]),
            "output_tokens": self.output_tokens,
            # A whole answer's first byte comes with its last, and says nothing of the first token.
            "ttft_s": self._since(self.first_body) if self.stream else None,
            "duration_s": round(now - self.started, 6),
        }
        if self.refused is not None:
            fields["refused"] = self.refused
        if not self.complete:
            fields["aborted"] = True
        return fields

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else round(moment - self.started, 6)


def admit(scope: Scope, job: Job) -> None:
    """Let the request's :class:`Call` take in its job, if there is one: an app may be run without access control.

    Raises:
        ApiError: the request is refused.
    """
    call: Call | None = scope.get(CALL)
    if call is not None:
        call.admit(job)


def request_id(given: bytes | None) -> str:
    """The client's id if it is of 1 to 128 letters, digits and ``._:-``; a new one otherwise."""
    if given is not None and _REQUEST_ID.fullmatch(given) is not None:
        return given.decode("ascii")
    return uuid.uuid4().hex
