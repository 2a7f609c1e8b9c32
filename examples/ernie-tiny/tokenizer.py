"""The tokenizer: a SentencePiece BPE of 8,000 pieces with ERNIE-4.5's ids and special tokens.

SentencePiece learns no piece with a newline followed by spaces, and Python code is full of them, so
the most frequent of those are put in as user-defined symbols.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as format_pb2

PIECES = 8000
TABLE = 8192  # rows of the embedding: the used ids, padded as ERNIE's table is
UNKNOWN, BEGIN, END = 0, 1, 2
FIRST_DIGIT, FIRST_BYTE = 3, 13
SPECIALS = ("<|end_of_sentence|>", "<|begin_of_sentence|>")
SPECIAL_IDS = {token: PIECES + i for i, token in enumerate(SPECIALS)}
CHAT_END, CHAT_BEGIN = SPECIAL_IDS[SPECIALS[0]], SPECIAL_IDS[SPECIALS[1]]
USED = PIECES + len(SPECIALS)
INDENTATIONS = 48
SPACE = "\u2581"  # how SentencePiece writes a space
CHAT_TEMPLATE = (
    "{{ '<|begin_of_sentence|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + '<|end_of_sentence|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def _indentations(texts: Iterable[str]) -> list[str]:
    counts = Counter(match for text in texts for match in re.findall(r"\n+(?:    )*", text))
    return [found.replace(" ", SPACE) for found, _ in counts.most_common(INDENTATIONS)]


def _sentences(texts: Iterable[str], length: int = 3000) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), length):
            yield text[start : start + length]


def train(texts: list[str]) -> bytes:
    """Learn the pieces from the texts, and return the `tokenizer.model` with ids in ERNIE's order."""
    indentations = _indentations(texts)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts),
        model_writer=written,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=20000,
        user_defined_symbols=[*"0123456789", *indentations],
        unk_id=UNKNOWN,
        bos_id=BEGIN,
        eos_id=END,
        pad_id=-1,  # ERNIE pads with <unk>
        num_threads=2,
        minloglevel=2,
    )
    model = format_pb2.ModelProto.FromString(written.getvalue())
    # SentencePiece puts user-defined symbols before the bytes; ERNIE's bytes begin at 13, after the digits.
    is_indentation = [piece.piece in set(indentations) for piece in model.pieces]
    moved = [piece for piece, moves in zip(model.pieces, is_indentation, strict=True) if moves]
    kept = [piece for piece, moves in zip(model.pieces, is_indentation, strict=True) if not moves]
    pieces = kept[: FIRST_BYTE + 256] + moved + kept[FIRST_BYTE + 256 :]
    del model.pieces[:]
    model.pieces.extend(pieces)
    return model.SerializeToString()


class Tokenizer:
    """Text to ids and back. Special tokens are read by name only where they are asked for."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.model` of a folder."""
        return cls((folder / "tokenizer.model").read_bytes())

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of the text; with `specials`, the names of special tokens in it become those tokens."""
        if not specials:
            return list(self._pieces.encode(text))
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text):
            ids += [SPECIAL_IDS[part]] if part in SPECIAL_IDS else self._pieces.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return str(self._pieces.decode([i for i in ids if i < PIECES and i not in (UNKNOWN, BEGIN, END)]))


def save(folder: Path, model: bytes) -> None:
    """Write the tokenizer's files as an ERNIE-4.5 repository has them."""
    names = {UNKNOWN: "<unk>", BEGIN: "<s>", END: "</s>"} | {i: token for token, i in SPECIAL_IDS.items()}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": name, **flags} for i, name in names.items()},
        "additional_special_tokens": list(SPECIALS),
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "cls_token": "<|begin_of_sentence|>",
        "eos_token": "</s>",
        "model_max_length": 2048,
        "pad_token": "<unk>",
        "sep_token": "<|end_of_sentence|>",
        "tokenizer_class": "Ernie4_5_Tokenizer",
        "unk_token": "<unk>",
    }
    special = {name: config[name] for name in config if name.endswith("_token") and isinstance(config[name], str)}
    special["additional_special_tokens"] = list(SPECIALS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, value in (
        ("tokenizer_config", config),
        ("special_tokens_map", special),
        ("added_tokens", SPECIAL_IDS),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
