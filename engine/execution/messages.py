"""What ranks tell each other beside tensors, as MessagePack."""

from __future__ import annotations

import msgspec
import numpy as np

from engine.errors import EngineDeadError
from engine.execution.batch import StepInput


class Hello(msgspec.Struct, tag="hello"):
    """A follower's first and only message."""

    token: str
    rank: int


class StepFrame(msgspec.Struct, tag="step"):
    """The arrays of a `StepInput` as little-endian bytes; ``slot_mapping`` 8 bytes each, the others 4."""

    token_ids: bytes
    positions: bytes
    slot_mapping: bytes
    block_tables: bytes
    query_start: bytes
    context_lens: bytes
    logits_rows: bytes


class Stop(msgspec.Struct, tag="stop"):
    """The engine ends."""


class Loaded(msgspec.Struct, tag="loaded"):
    """A follower process has its weights."""


class Failed(msgspec.Struct, tag="failed"):
    """A follower process's last words."""

    error: str
    """Name of the exception's class."""
    text: str


_FRAMES = msgspec.msgpack.Decoder(StepFrame | Stop)


def encode_step(step: StepInput) -> bytes:
    """A `StepInput` as a message."""
    return msgspec.msgpack.encode(
        StepFrame(
            token_ids=step.token_ids.astype("<i4", copy=False).tobytes(),
            positions=step.positions.astype("<i4", copy=False).tobytes(),
            slot_mapping=step.slot_mapping.astype("<i8", copy=False).tobytes(),
            block_tables=step.block_tables.astype("<i4", copy=False).tobytes(),
            query_start=step.query_start.astype("<i4", copy=False).tobytes(),
            context_lens=step.context_lens.astype("<i4", copy=False).tobytes(),
            logits_rows=step.logits_rows.astype("<i4", copy=False).tobytes(),
        )
    )


def decode_step(message: bytes) -> StepInput | None:
    """A message as a `StepInput`; None for the end.

    Raises:
        EngineDeadError: the message is malformed, or its arrays do not fit together.
    """
    try:
        frame = _FRAMES.decode(message)
        if isinstance(frame, Stop):
            return None
        step = _arrays(frame)
        _check(step)
    except (msgspec.MsgspecError, ValueError) as error:
        raise EngineDeadError(f"malformed step message of {len(message)} bytes: {error}") from error
    return step


def _arrays(frame: StepFrame) -> StepInput:
    context_lens = np.frombuffer(frame.context_lens, "<i4").astype(np.int32)
    return StepInput(
        token_ids=np.frombuffer(frame.token_ids, "<i4").astype(np.int32),
        positions=np.frombuffer(frame.positions, "<i4").astype(np.int32),
        slot_mapping=np.frombuffer(frame.slot_mapping, "<i8").astype(np.int64),
        block_tables=np.frombuffer(frame.block_tables, "<i4").astype(np.int32).reshape(max(1, len(context_lens)), -1),
        query_start=np.frombuffer(frame.query_start, "<i4").astype(np.int32),
        context_lens=context_lens,
        logits_rows=np.frombuffer(frame.logits_rows, "<i4").astype(np.int32),
    )


def _check(step: StepInput) -> None:
    tokens, requests = len(step.token_ids), len(step.context_lens)
    if not len(step.positions) == len(step.slot_mapping) == tokens:
        raise ValueError(f"{tokens} tokens, {len(step.positions)} positions, {len(step.slot_mapping)} slots")
    if requests == 0 or len(step.query_start) != requests + 1:
        raise ValueError(f"{requests} requests, {len(step.query_start)} entries of query_start")
    counts = np.diff(step.query_start)
    if step.query_start[0] != 0 or step.query_start[-1] != tokens or (counts < 1).any():
        raise ValueError(f"query_start does not divide {tokens} tokens among {requests} requests")
    if (step.context_lens < counts).any():
        raise ValueError("a context shorter than its new tokens")
    for name, array in (("slot", step.slot_mapping), ("block", step.block_tables), ("position", step.positions)):
        if (array < 0).any():
            raise ValueError(f"a negative {name}")
    if ((step.logits_rows < 0) | (step.logits_rows >= tokens)).any():
        raise ValueError(f"logits wanted of a row outside 0 ... {tokens - 1}")
