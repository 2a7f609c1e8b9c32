"""The keys in force: read at start, and again whenever their file changes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from deployments.access.config import AccessConfig
from deployments.access.keys import ApiKey, KeyFileError, KeySet, parse_keys

logger = logging.getLogger(__name__)

_Version = tuple[int, int, int]


class Keyring:
    """The current :class:`KeySet`. A file that is broken or gone leaves the keys read before in force.

    Attributes:
        required: whether requests need a key at all.
    """

    def __init__(self, config: AccessConfig, *, on_change: Callable[[tuple[ApiKey, ...]], None]) -> None:
        """Read the keys.

        Raises:
            KeyFileError: the source is missing or wrong.
        """
        self._path = Path(config.keys_file) if config.keys_file is not None else None
        self._on_change = on_change
        self._version: _Version | None = None
        self._problem: str | None = None
        self._set = KeySet()
        self.required = config.keys_file is not None or config.keys_env is not None
        if self._path is not None:
            self._version, keys = self._read(self._path)
            self._install(keys)
        elif config.keys_env is not None:
            text = os.environ.get(config.keys_env)
            if text is None:
                raise KeyFileError(f"access.keys_env: this process has no environment variable {config.keys_env}")
            self._install(parse_keys(text, source=f"environment variable {config.keys_env}"))

    def find(self, presented: bytes) -> ApiKey | None:
        """The record of a key that a client presents, whether still good or not."""
        return self._set.find(presented)

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All records, those that are good no longer among them."""
        return self._set.keys

    async def reload(self) -> None:
        """Read the file if it has changed."""
        if self._path is None:
            return
        try:
            read = await asyncio.to_thread(self._read_if_changed, self._path)
        except KeyFileError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                logger.error("%s; the %d keys read before stay in force", error, len(self._set.keys))
            return
        self._problem = None
        if read is not None:
            self._version, keys = read
            self._install(keys)

    def _install(self, keys: list[ApiKey]) -> None:
        self._set = KeySet(keys)
        self._on_change(self._set.keys)
        logger.info("%d API keys are in force", len(keys))

    def _read_if_changed(self, path: Path) -> tuple[_Version, list[ApiKey]] | None:
        with suppress(OSError):  # reading says it better
            if _version(os.stat(path)) == self._version:
                return None
        return self._read(path)

    @staticmethod
    def _read(path: Path) -> tuple[_Version, list[ApiKey]]:
        try:
            with path.open(encoding="utf-8") as file:
                version = _version(os.fstat(file.fileno()))
                text = file.read()
        except OSError as error:
            raise KeyFileError(f"key file {path} can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise KeyFileError(f"key file {path} is not UTF-8 text") from None
        return version, parse_keys(text, source=f"key file {path}")


def _version(status: os.stat_result) -> _Version:
    """Changes when a file is written, or replaced by another, as Kubernetes does with secrets."""
    return status.st_mtime_ns, status.st_size, status.st_ino
