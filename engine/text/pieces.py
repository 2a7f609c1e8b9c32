"""A small edit of SentencePiece's `tokenizer.model`: pieces that text must never match become control pieces.

The file is a protocol buffer (sentencepiece_model.proto): field 1 of the model is a piece, whose field 1 is its text
and field 3 its type, 3 being CONTROL. Read by hand, so that no protobuf runtime is needed for one enum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from engine.errors import ConfigError

_PIECES = 1
_TEXT = 1
_TYPE = 3
_CONTROL = b"\x18\x03"  # field 3 as a varint: 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def make_control(model: bytes, names: Collection[str]) -> bytes:
    """The same model with the pieces called ``names`` as control pieces: in no text, and without text of their own."""
    wanted = {name.encode() for name in names}
    parts: list[bytes] = []
    for number, payload, whole in _fields(model):
        fields = list(_fields(payload)) if number == _PIECES else []
        if any(field == _TEXT and text in wanted for field, text, _ in fields):
            kept = b"".join(raw for field, _, raw in fields if field != _TYPE) + _CONTROL
            parts += [b"\x0a", _varint(len(kept)), kept]
        else:
            parts.append(whole)
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field's number, its payload (without length), and its whole encoding."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            payload = at
            _, at = _read_varint(message, at)
        elif kind == _BYTES:
            length, payload = _read_varint(message, at)
            at = payload + length
        elif kind in (_FIXED32, _FIXED64):
            payload = at
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ConfigError(f"tokenizer.model is malformed: wire type {kind} at byte {start}")
        yield key >> 3, message[payload:at], message[start:at]


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ConfigError("tokenizer.model is malformed: it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
