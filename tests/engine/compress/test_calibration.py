"""Text -> the token sequences that a model is fitted to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.compress.calibration import PIECE_CHARACTERS, read_documents, sequences, standard_library
from engine.errors import ConfigError


class Characters:
    """A tokenizer whose tokens are characters; 0 ends a document."""

    eos_token_ids = (0, 5)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def text(tokens: torch.Tensor) -> str:
    return "".join(map(chr, tokens.flatten().tolist()))


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(min_codepoint=1), min_size=1), min_size=1).filter(lambda d: any(map(str.strip, d))),
    st.integers(1, 4), st.integers(2, 9), st.integers(0, 3),
)  # fmt: skip
def test_sequences_are_the_documents_in_some_order(documents: list[str], count: int, length: int, seed: int) -> None:
    documents = [document for document in documents if document.strip()]
    total = sum(len(document) + 1 for document in documents)
    if total < length:
        with pytest.raises(ConfigError, match=rf"{total} tokens in {len(documents)} documents.* sequence of {length}"):
            sequences(documents, Characters(), num_samples=count, sequence_length=length, seed=seed)
        return
    found = sequences(documents, Characters(), num_samples=count, sequence_length=length, seed=seed)
    assert found.shape == (min(count, total // length), length)
    assert torch.equal(found, sequences(documents, Characters(), num_samples=count, sequence_length=length, seed=seed))
    *whole, last = text(found).split("\0")
    remaining = list(documents)
    for document in whole:
        remaining.remove(document)
    assert any(document.startswith(last) for document in remaining) or not last


def test_a_long_document_is_cut_at_a_line_and_nothing_is_lost() -> None:
    lines = [f"{i:06d}\n" for i in range(2 * PIECE_CHARACTERS // 7)]
    found = text(sequences(["".join(lines)], Characters(), num_samples=10**6, sequence_length=2))
    assert sorted(found.replace("\0", "").split()) == [line.strip() for line in lines]
    endless = "x" * (PIECE_CHARACTERS + 5)
    assert text(sequences([endless], Characters(), num_samples=10**6, sequence_length=2)).count("x") == len(endless)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (4, 1)])
def test_sizes_must_be_positive(samples: int, length: int) -> None:
    with pytest.raises(ConfigError, match=f"num_samples is {samples} and sequence_length {length}"):
        sequences(["text"], Characters(), num_samples=samples, sequence_length=length)


def test_files_of_text_and_of_json_lines(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("Grüße\n\nagain", encoding="utf-8")
    lines.write_text('{"text": "one\u2028line"}\n\n{"text": "two", "more": 1}\n', encoding="utf-8")
    assert list(read_documents([plain, lines])) == ["Grüße\n\nagain", "one\u2028line", "two"]
    assert list(read_documents([plain, lines], exclude=["*.txt"])) == ["one\u2028line", "two"]
    assert list(read_documents([plain, lines], exclude=[str(lines)])) == ["Grüße\n\nagain"]
    with pytest.raises(ConfigError, match=r"no calibration file is left of 2; \* exclude them all"):
        list(read_documents([plain, lines], exclude=["*"]))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"texts": "x"}', "line 1 is no object with a text in 'text'"),
        ("a.jsonl", b'["x"]', "line 1 is no object"),
        ("absent.txt", None, "can't be read: No such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        list(read_documents([tmp_path / name]))


def test_the_standard_library_is_there_and_files_can_be_left_out() -> None:
    whole = standard_library()
    assert len(whole) > 100
    assert len(standard_library(exclude=["json/*"])) == len(whole) - 5
