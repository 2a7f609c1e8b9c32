"""Changing a key file: one writer at a time, and readers see it before or after, never in between."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from deployments.access.keys import ApiKey, KeyFileError, make_key, parse_keys


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """What a new key is for; see :class:`ApiKey`."""

    name: str
    models: tuple[str, ...] = ("*",)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    expires: datetime | None = None


@dataclass(slots=True)
class _Draft:
    """A key file being changed: its lines, so that comments stay, and the record of each line that is one."""

    lines: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[ApiKey]:
        return parse_keys("".join(self.lines), source="key file")

    def replace(self, key: ApiKey) -> None:
        for index, line in enumerate(self.lines):
            records = parse_keys(line, source="key file")
            if records and records[0].id == key.id:
                self.lines[index] = key.line()

    def find(self, key_id: str) -> ApiKey:
        for key in self.keys:
            if key.id == key_id:
                return key
        raise KeyFileError(f"there is no key with id {key_id!r:.40}; 'dibit keys list' shows all")


def new_record(options: KeyOptions, *, now: datetime, taken: tuple[str, ...] = ()) -> tuple[str, ApiKey]:
    """A new key and its record.

    Raises:
        KeyFileError: an option is out of range.
    """
    key, key_id, digest = make_key(taken)
    try:
        record = _record(key_id, digest, options, now=now)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise KeyFileError(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from None
    return key, record


def _record(key_id: str, digest: str, options: KeyOptions, *, now: datetime) -> ApiKey:
    return ApiKey(
        id=key_id,
        name=options.name,
        hash=digest,
        models=options.models,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
        max_concurrent=options.max_concurrent,
        created=now,
        expires=options.expires,
    )


class KeyFile:
    """A key file that is edited in place. It is made, readable by its owner alone, with the first key.

    Every method raises KeyFileError when the file is wrong or can't be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()

    def list(self) -> list[ApiKey]:
        """All records, in the order of the file."""
        if not self.path.exists():
            raise KeyFileError(f"there is no key file {str(self.path)!r}; 'dibit keys new' makes one")
        return parse_keys(self._text(), source=f"key file {self.path}")

    def add(self, options: KeyOptions, *, now: datetime) -> tuple[str, ApiKey]:
        """Make a key; returns it, which nobody can do again, and its record."""
        with self._edit() as draft:
            key, record = new_record(options, now=now, taken=tuple(key.id for key in draft.keys))
            draft.lines.append(record.line())
        return key, record

    def revoke(self, key_id: str, *, now: datetime) -> ApiKey:
        """End a key now. Its line stays, so that logs keep a name for it."""
        with self._edit() as draft:
            record = draft.find(key_id).model_copy(update={"revoked": now})
            draft.replace(record)
        return record

    def rotate(self, key_id: str, *, now: datetime, old_until: datetime) -> tuple[str, ApiKey]:
        """Make a key with the rights and lifetime of an old one, which ends at ``old_until`` or earlier."""
        with self._edit() as draft:
            old = draft.find(key_id)
            if old.revoked is not None:
                raise KeyFileError(f"key {key_id} has been revoked; make a new one with 'dibit keys new'")
            lifetime = None if old.expires is None else old.expires - old.created
            key, new_id, digest = make_key([key.id for key in draft.keys])
            record = old.model_copy(
                update={
                    "id": new_id,
                    "hash": digest,
                    "created": now,
                    "expires": None if lifetime is None else now + lifetime,
                }
            )
            ends = old_until if old.expires is None else min(old.expires, old_until)
            draft.replace(old.model_copy(update={"expires": ends}))
            draft.lines.append(record.line())
        return key, record

    @contextmanager
    def _edit(self) -> Iterator[_Draft]:
        folder = self.path.absolute().parent
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise KeyFileError(f"{str(folder)!r} can't be opened: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # the folder, as the file itself is replaced
            text = self._text() if self.path.exists() else ""
            parse_keys(text, source=f"key file {self.path}")
            if text and not text.endswith("\n"):
                text += "\n"
            draft = _Draft(text.splitlines(keepends=True))
            yield draft
            self._replace("".join(draft.lines))
        finally:
            os.close(descriptor)

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise KeyFileError(f"key file {self.path} can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise KeyFileError(f"key file {self.path} is not UTF-8 text") from None

    def _replace(self, text: str) -> None:
        target = self.path.resolve()
        try:
            status = target.stat() if target.exists() else None
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    if status is not None:  # mkstemp's own mode is 0600
                        os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
                        with suppress(PermissionError):  # only root gives files away
                            os.fchown(file.fileno(), status.st_uid, status.st_gid)
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise KeyFileError(f"key file {self.path} can't be written: {error.strerror}") from None
