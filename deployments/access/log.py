"""The access log: one JSON object a request and line. It holds what the server knows about a request, nothing that a
client wrote: no header, no query, no path that isn't a route's own pattern, and prompts only where the operator asks.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import msgspec

from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_STREAMS = {"stdout": 1, "stderr": 2}
_encode = msgspec.json.Encoder().encode


class AccessLog:
    """Lines to a standard stream or a file; each is one write, so that processes can share a file.

    Args:
        target: ``stdout``, ``stderr``, ``off``, or the path of a file to append to.

    Raises:
        ConfigError: the file can't be opened.
    """

    def __init__(self, target: str) -> None:
        self._descriptor: int | None = None
        self._owned = False
        self._failed = False
        if target == "off":
            return
        if target in _STREAMS:
            self._descriptor = _STREAMS[target]
            return
        try:
            self._descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        except OSError as error:
            raise ConfigError(f"access.log: {target!r} can't be opened: {error.strerror}") from None
        self._owned = True

    @property
    def on(self) -> bool:
        """Whether lines go anywhere."""
        return self._descriptor is not None

    def write(self, fields: dict[str, Any]) -> None:
        """Write a line. A log that can't be written (a full disk) costs no request; it is reported once."""
        if self._descriptor is None:
            return
        line = memoryview(_encode(fields) + b"\n")
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            if not self._failed:
                logger.error("The access log can't be written: %s", error.strerror)
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        """Close a file; standard streams stay open."""
        if self._owned and self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
