"""API keys: what they look like, and what is kept of them.

A key is ``sk-dibit-``, a public id of 8 hexadecimal digits, ``-``, and 32 random bytes in URL-safe base64. Only its
SHA-256 is kept. A slow hash such as scrypt guards passwords, which can be guessed; nobody guesses 256 random bits,
and a slow hash would cost each request tens of milliseconds.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from engine.errors import ConfigError

PREFIX = "sk-dibit-"
"""Constant, so that scanners for leaked secrets can be taught to find keys."""
_SECRET_BYTES = 32
_ID_SLICE = slice(len(PREFIX), len(PREFIX) + 8)
_KEY_PATTERN = re.compile(rb"sk-dibit-[0-9a-f]{8}-[A-Za-z0-9_-]{43}")
_NOBODY = bytes(32)

Limit = Field(default=None, ge=1)


class KeyFileError(ConfigError):
    """A key file is missing or wrong; the message names the line and never quotes it."""


class ApiKey(BaseModel):
    """One line of a key file: everything about a key but the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    """Part of the key that is no secret."""
    name: str = Field(min_length=1, max_length=64)
    """For people and logs; several keys may share it."""
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    models: tuple[str, ...] = ("*",)
    """Names of models, or patterns with ``*``. Empty: metrics and pages only."""
    requests_per_minute: int | None = Limit
    tokens_per_minute: int | None = Limit
    """Prompt and output tokens together."""
    max_concurrent: int | None = Limit
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("holds characters that can't be printed")
        return name

    def allows(self, model: str) -> bool:
        """Whether the key is for this model."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def refusal(self, now: datetime) -> str | None:
        """Why the key is good no longer; None while it is."""
        if self.revoked is not None and self.revoked <= now:
            return "has been revoked"
        if self.expires is not None and self.expires <= now:
            return f"expired on {self.expires.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        return None

    def line(self) -> str:
        """The record as a line of a key file."""
        return self.model_dump_json(exclude_none=True) + "\n"


def make_key(taken: Collection[str] = ()) -> tuple[str, str, str]:
    """A new key, its id and its hash.

    Args:
        taken: ids that are in use.
    """
    while (key_id := secrets.token_hex(4)) in taken:
        pass
    key = f"{PREFIX}{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    return key, key_id, f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def parse_keys(text: str, *, source: str) -> list[ApiKey]:
    """The records of a key file: a JSON object a line; empty lines and those that begin with ``#`` don't count.

    Args:
        source: where the text is from, for messages.

    Raises:
        KeyFileError: a line is wrong, or two have the same id.
    """
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = ApiKey.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            # An unknown field's name may be a key that somebody pasted.
            known = [str(part) for part in first["loc"] if part in ApiKey.model_fields]
            field = ".".join(known) + ": " if known else ""
            raise KeyFileError(f"{source}, line {number}: {field}{first['msg']}") from None
        if key.id in keys:
            raise KeyFileError(f"{source}, line {number}: another line has the same id, {key.id}")
        keys[key.id] = key
    return list(keys.values())


class KeySet:
    """Keys by their ids, ready to be looked up. Immutable."""

    def __init__(self, keys: Collection[ApiKey] = ()) -> None:
        self.keys = tuple(keys)
        self._digests = {key.id.encode(): (bytes.fromhex(key.hash.removeprefix("sha256:")), key) for key in keys}

    def find(self, presented: bytes) -> ApiKey | None:
        """The record of a key that a client presents, whether still good or not.

        Takes as long for a wrong key with a known id as for one with an unknown id.
        """
        if _KEY_PATTERN.fullmatch(presented) is None:
            return None
        digest, key = self._digests.get(presented[_ID_SLICE], (_NOBODY, None))
        return key if hmac.compare_digest(hashlib.sha256(presented).digest(), digest) else None
