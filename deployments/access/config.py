"""The ``access`` section of ``serve_config.yaml``: keys, limits, origins, logs."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_BODY_BYTES = 8 << 20
"""Largest request body by default. A 128k-token prompt is about half a megabyte of text."""

LOG_STREAMS = ("stderr", "stdout", "off")


class AccessConfig(BaseModel):
    """Who may send requests, how large and how many, and what is written down about them.

    No key stands here: ``keys_file`` or ``keys_env`` say where the hashes are, which ``dibit keys`` makes. Without
    either, whoever reaches the port is served.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    keys_file: str | None = None
    """Absolute path of the key file, on every node that may run an ingress. It is read again when it changes."""
    keys_env: str | None = None
    """Name of an environment variable that holds the lines of a key file; it is read when an ingress starts."""
    reload_seconds: float = Field(default=2.0, gt=0)
    """How often the key file is looked at."""
    public_paths: tuple[str, ...] = ("/health", "/ready")
    """Paths that need no key."""

    max_body_bytes: int = Field(default=MAX_BODY_BYTES, ge=1)
    """Largest request body; more is answered with 413."""
    body_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that a client may take to send its body; a slower one gets 408."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Most prompt tokens of a request, all its prompts together; None leaves it to the model's context."""
    max_requests_in_flight: int = Field(default=1024, ge=1)
    """Requests that one ingress process works on at once; the rest get 429 before their bodies are read."""

    cors_origins: tuple[str, ...] = ()
    """Origins (``https://chat.example.com``, or ``*``) whose pages may call the server. None by default."""

    log: str = "stderr"
    """Where the access log goes: ``stderr``, ``stdout``, ``off``, or the absolute path of a file to append to."""
    log_prompts: bool = False
    """Whether the access log holds the text of prompts."""

    @field_validator("keys_file")
    @classmethod
    def _check_keys_file(cls, path: str | None) -> str | None:
        if path is None:
            return None
        place = Path(path).expanduser()
        if not place.is_absolute():
            raise ValueError(f"{path!r} is relative; give an absolute path, the same on every node")
        return str(place)

    @field_validator("keys_env")
    @classmethod
    def _check_keys_env(cls, name: str | None) -> str | None:
        # Whoever puts a key here by mistake must not find it in an error message.
        if name is not None and not (name.isidentifier() and name.isascii()):
            raise ValueError("expected the name of an environment variable; keys themselves do not belong here")
        return name

    @field_validator("public_paths")
    @classmethod
    def _check_public_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not path.startswith("/"):
                raise ValueError(f"{path!r} does not begin with '/'")
        return paths

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, _, host = origin.partition("://")
            if origin != "*" and (scheme not in ("http", "https") or not host or "/" in host):
                raise ValueError(f"{origin!r} is no origin; expected one such as 'https://chat.example.com', or '*'")
        return origins

    @field_validator("log")
    @classmethod
    def _check_log(cls, log: str) -> str:
        if log not in LOG_STREAMS and not Path(log).is_absolute():
            raise ValueError(f"{log!r} is neither {', '.join(LOG_STREAMS)} nor an absolute path")
        return log

    @model_validator(mode="after")
    def _check_one_source(self) -> AccessConfig:
        if self.keys_file is not None and self.keys_env is not None:
            raise ValueError("keys_file and keys_env are both set; keys come from one place")
        return self
