"""A folder beside the result in which finished layers are kept, so that a killed run can go on where it was.

Whatever stands in it under its final name is whole: files are written under another name, brought to the disk, and
renamed. What the layers depend on (the source, the plan, the calibration tokens, the machine's arithmetic) stands in
``journal.json``; only a run of the same may add to them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from safetensors import safe_open
from torch import Tensor

from engine.checkpoint.writer import write_tensors
from engine.compress.report import Report
from engine.errors import ConfigError

Fingerprint = Mapping[str, Any]
"""What the result depends on: a name for people -> JSON."""


class UnfinishedRunError(ConfigError):
    """A run that is neither asked to be resumed nor to be thrown away, can't be resumed, or is still at work."""


class Journal:
    """The work folder of one result. A context manager; while it is open, no other process can open it.

    Args:
        target: the folder that shall be made; the work folder is ``.NAME.quantize`` beside it.
        fingerprint: what the layers depend on.
        resume: go on with what is there, rather than refuse it.
        discard: throw away what is there (unless it is resumed).

    Raises:
        UnfinishedRunError: one is there that is not asked for, was of something else, or is still at work.
    """

    def __init__(self, target: Path, fingerprint: Fingerprint, *, resume: bool, discard: bool) -> None:
        self.folder = work_folder(target)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._resume = resume
        self._discard = discard
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        record = self.folder / "journal.json"
        if record.exists() and not self._resume and not self._discard:
            raise UnfinishedRunError(
                f"{self.folder} holds an unfinished run with {self.finished_layers()} finished layers; "
                "go on with it (--resume), or throw it away (--overwrite)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("wb")
        try:
            self._begin(record)
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.finished_layers():
            self.remove()  # there is nothing to go on with
        if self._lock is not None:
            self._lock.close()

    def finished_layers(self) -> int:
        """How many layers are done; they are done in order."""
        count = 0
        while self._layer(count).exists():
            count += 1
        return count

    def add_layer(self, layer: int, tensors: Mapping[str, Tensor], report: Report) -> None:
        """Keep a layer's tensors, by their names in the result."""
        path = self._layer(layer)
        partial = path.with_suffix(".partial")
        write_tensors(partial, dict(tensors), metadata={"report": json.dumps(report.to_json())})
        self._publish(partial, path)

    def layer(self, layer: int) -> tuple[dict[str, Tensor], Report]:
        """A finished layer, as it was added; the tensors are views of the mapped file."""
        with safe_open(self._layer(layer), framework="pt", device="cpu") as file:
            report = Report.from_json(json.loads(file.metadata()["report"]))
            return {name: file.get_tensor(name) for name in file.keys()}, report  # noqa: SIM118  # no mapping

    def remove(self) -> None:
        """Remove the folder: everything is in its place, or nothing is worth keeping."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, record: Path) -> None:
        if self._lock is None:
            raise RuntimeError("a journal is begun by entering it")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnfinishedRunError(f"another process is at work in {self.folder}; wait for it, or end it") from None
        if record.exists() and self._resume:
            self._compare(record)
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        partial = record.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(self._fingerprint, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        self._publish(partial, record)

    def _compare(self, record: Path) -> None:
        before = json.loads(record.read_text(encoding="utf-8"))
        for name in sorted({*before, *self._fingerprint}):
            was, now = before.get(name), self._fingerprint.get(name)
            if was != now:
                raise UnfinishedRunError(
                    f"{self.folder} holds an unfinished run of something else: {name} was {_short(was)}, now it is "
                    f"{_short(now)}; resume it with what it was begun with, or throw it away (--overwrite)"
                )

    def _publish(self, partial: Path, path: Path) -> None:
        partial.rename(path)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, shall survive a power cut
        finally:
            os.close(folder)

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"


def work_folder(target: Path) -> Path:
    """Where the unfinished run for ``target`` is kept."""
    target = target.absolute()
    return target.with_name(f".{target.name}.quantize")


def file_states(folder: Path, hashed: list[Path]) -> dict[str, str]:
    """What tells a changed source: size and time of its weight files, and a digest of the small ``hashed`` ones."""
    states = {}
    for file in sorted(folder.glob("*.safetensors")):
        status = file.stat()
        states[file.name] = f"{status.st_size} bytes of {status.st_mtime_ns}"
    for file in hashed:
        states[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return states


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:12]})"
