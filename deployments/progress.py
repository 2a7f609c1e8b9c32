"""What the processes behind Ray tell the user's terminal: log lines that Ray forwards, few and readable."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("deployments.progress")

MIN_INTERVAL_S = 2.0
MIN_PERCENT = 10


def log_to_stderr() -> None:
    """Let the loggers of this process's rooms write to stderr, which Ray shows to the driver.

    For the entry points of Ray actors alone; a process that already has handlers there is left as it is.
    """
    for name in ("deployments", "engine", "kernels"):
        room = logging.getLogger(name)
        if not room.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
            room.addHandler(handler)
            room.setLevel(logging.INFO)


class LoadingProgress:
    """Logs how far a model has loaded: no line sooner than 2 s or 10 % after the one before, and one at the end.

    Called as the engine's ``progress(what, bytes_done, bytes_total)``.
    """

    def __init__(self, model: str, *, speaks: bool = True) -> None:
        """``speaks`` False keeps quiet: of several ranks, one line is enough."""
        self._model = model
        self._speaks = speaks
        self._started = self._logged_at = time.monotonic()
        self._logged_percent = 0

    def __call__(self, what: str, bytes_done: int, bytes_total: int) -> None:
        """Take note of the bytes read so far."""
        percent = 100 * bytes_done // max(bytes_total, 1)
        now = time.monotonic()
        if not self._speaks or now - self._logged_at < MIN_INTERVAL_S or percent - self._logged_percent < MIN_PERCENT:
            return
        self._logged_at, self._logged_percent = now, percent
        logger.info("%s: %d %% of %s loaded (%s)", self._model, percent, readable_bytes(bytes_total), what)

    def done(self) -> None:
        """Log that all is loaded."""
        logger.info("%s: loaded in %.1f s", self._model, time.monotonic() - self._started)


def readable_bytes(count: int) -> str:
    """A number of bytes in the unit that fits: ``readable_bytes(12_300_000)`` is ``"12.3 MB"``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
