"""The vocabulary of a model: text to ids, and each id's bytes, from `tokenizer.model` or `tokenizer.json`.

Both kinds encode text without ever producing a special token from it, whatever the text says. Special tokens are the
business of :class:`engine.tokenizer.Tokenizer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from engine.errors import ConfigError, UnsupportedError
from engine.text.pieces import make_control

SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary(Protocol):
    """Pieces and their bytes.

    ``pieces``: each id's name; ``token_bytes``: what each id adds to the text (empty for control pieces);
    ``dummy_prefix``: whether encoding puts a space before the text, which decoding a whole text takes off again.
    """

    pieces: list[str]
    token_bytes: list[bytes]
    dummy_prefix: bool

    def encode(self, text: str) -> list[int]:
        """Ids of the text, all of it plain."""
        ...


class SentencePieceVocabulary:
    """`tokenizer.model`.

    Args:
        special: names of special tokens. Where the file keeps one as a piece that text could match (user-defined, as
            uploads differ), it is made a control piece, which text never matches.
    """

    def __init__(self, model: bytes, special: Collection[str] = ()) -> None:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ConfigError(f"not a SentencePiece model: {error}") from None
        unknown = processor.unk_id()
        ids = {name: processor.piece_to_id(name) for name in special}
        matchable = [name for name, id_ in ids.items() if id_ != unknown and not processor.is_control(id_)]
        if matchable:
            processor = sentencepiece.SentencePieceProcessor(model_proto=make_control(model, matchable))
        self._processor = processor
        every_id = range(processor.get_piece_size())
        self.pieces = list(processor.id_to_piece(list(every_id)))
        self.token_bytes = [
            b""
            if processor.is_control(id_) or processor.is_unknown(id_)
            else bytes([int(piece[3:5], 16)])
            if processor.is_byte(id_)
            else piece.replace(SPACE, " ").encode()
            for id_, piece in zip(every_id, self.pieces, strict=True)
        ]
        self.dummy_prefix = str(processor.id_to_piece(processor.encode("a")[0])).startswith(SPACE)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, all of it plain."""
        return list(self._processor.encode(text))


class HuggingFaceVocabulary:
    """`tokenizer.json` of the tokenizers library: byte-level BPE, or SentencePiece-like with byte fallback."""

    def __init__(self, source: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"not a tokenizer.json that the tokenizers library reads: {error}") from None
        self._tokenizer.encode_special_tokens = True  # special tokens' names are plain text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = [""] * (max(names.values(), default=-1) + 1)
        for name, id_ in names.items():
            self.pieces[id_] = name
        added = self._tokenizer.get_added_tokens_decoder()
        self.added: dict[int, tokenizers.AddedToken] = dict(added)
        decoders = _flat_decoders(json.loads(source).get("decoder"))
        to_bytes = _byte_level if "ByteLevel" in decoders else _metaspace
        self.token_bytes = [
            (b"" if added[id_].special else piece.encode()) if id_ in added else to_bytes(piece)
            for id_, piece in enumerate(self.pieces)
        ]
        self.dummy_prefix = bool(
            decoders.get("Strip", {}).get("start")
            or decoders.get("Metaspace", {"prepend_scheme": "never"}).get("prepend_scheme") != "never"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of the text, all of it plain."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def load(folder: Path, special: Collection[str]) -> SentencePieceVocabulary | HuggingFaceVocabulary:
    """Read the folder's `tokenizer.model`, else its `tokenizer.json`.

    Raises:
        ConfigError: neither is there, or the file is malformed.
        UnsupportedError: a `tokenizer.json` of a kind whose tokens have no bytes of their own.
    """
    model, source = folder / "tokenizer.model", folder / "tokenizer.json"
    try:
        if model.is_file():
            return SentencePieceVocabulary(model.read_bytes(), special)
        if source.is_file():
            return HuggingFaceVocabulary(source.read_text(encoding="utf-8"))
    except (ConfigError, UnsupportedError) as error:
        raise type(error)(f"{folder}: {error}") from None
    raise ConfigError(f"{folder} holds neither tokenizer.model nor tokenizer.json; one of them is needed")


def _flat_decoders(decoder: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    known = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    found = {step["type"]: step for step in steps}
    if not found or found.keys() - known:
        raise UnsupportedError(
            f"tokenizer.json with decoder {sorted(found) or None}; supported: ByteLevel, or SentencePiece-like "
            "(Replace, ByteFallback, Fuse, Strip, Metaspace)"
        )
    return found


def _metaspace(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _byte_level(piece: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in piece)
    except KeyError:
        return piece.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (bytes_to_unicode in its encoder.py), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}
