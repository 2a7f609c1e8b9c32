"""Text whose tokens show what the inputs of every matrix look like."""

from __future__ import annotations

import fnmatch
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import ConfigError

PIECE_CHARACTERS = 1 << 16
"""Longer documents are cut into pieces at the ends of lines, so that a few long ones do not fill the calibration."""


class Encoder(Protocol):
    """What is needed of `engine.tokenizer.Tokenizer`."""

    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added."""


def sequences(
    documents: Iterable[str], tokenizer: Encoder, *, num_samples: int, sequence_length: int, seed: int = 0
) -> Tensor:
    """Documents -> sequences of tokens.

    The documents come in a random order (of ``seed``), each followed by the model's end-of-text token; what they
    make together is cut into sequences. Documents are tokenized only as far as they are needed.

    Args:
        documents: texts, all of which are held in memory.
        tokenizer: the model's.
        num_samples: sequences wanted.
        sequence_length: tokens in each.
        seed: of the order.

    Returns:
        int64 [S, L]; S is less than ``num_samples`` where the text has no more.

    Raises:
        ConfigError: there is not even one sequence's worth of text, or a size is not positive.
    """
    if num_samples < 1 or sequence_length < 2:
        raise ConfigError(
            f"num_samples is {num_samples} and sequence_length {sequence_length}; expected at least 1 and 2"
        )
    pieces = [piece for document in documents for piece in _pieces(document)]
    random.Random(seed).shuffle(pieces)
    end = list(tokenizer.eos_token_ids[:1])
    wanted = num_samples * sequence_length
    tokens: list[int] = []
    for piece in pieces:
        tokens += tokenizer.encode(piece) + end
        if len(tokens) >= wanted:
            break
    whole = min(len(tokens), wanted) // sequence_length
    if whole == 0:
        raise ConfigError(
            f"the calibration text has {len(tokens)} tokens in {len(pieces)} documents, less than one sequence of "
            f"{sequence_length}; give more text, or a smaller sequence length"
        )
    return torch.tensor(tokens[: whole * sequence_length]).view(whole, sequence_length)


def read_documents(files: Sequence[Path], *, exclude: Sequence[str] = (), field: str = "text") -> Iterator[str]:
    """The documents of UTF-8 files: a whole text file is one, and so is ``field`` of each line of a ``.jsonl`` file.

    Args:
        files: what to read.
        exclude: patterns (``*.test.txt``) of file names or paths to leave out, such as texts that the model will be
            evaluated on.
        field: where the text is in a JSON line.

    Raises:
        ConfigError: a file can't be read, is not UTF-8, or a line is not an object with the field; or all of them
            are excluded.
    """
    kept = [file for file in files if not _excluded(file, exclude)]
    if not kept:
        raise ConfigError(f"no calibration file is left of {len(files)}; {', '.join(exclude)} exclude them all")
    for file in kept:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"calibration file {file} can't be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"calibration file {file} is not UTF-8 text (byte {error.start})") from None
        if file.suffix == ".jsonl":
            yield from _json_lines(file, text, field)
        else:
            yield text


def standard_library(*, exclude: Sequence[str] = ()) -> list[str]:
    """The sources of this Python's standard library, without its tests: text that every machine has.

    It is English and code. Text like that which the model will see makes a better model.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not left_out & set(file.relative_to(root).parts) and not _excluded(file.relative_to(root), exclude)
    ]
    return [file.read_bytes().decode("utf-8", errors="ignore") for file in files]


def _excluded(file: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(file.name, each) or fnmatch.fnmatch(file.as_posix(), each) for each in patterns)


def _json_lines(file: Path, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number} is not valid JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            raise ConfigError(f"{file}, line {number} is no object with a text in {field!r}")
        yield value[field]


def _pieces(document: str) -> Iterator[str]:
    while len(document) > PIECE_CHARACTERS:
        cut = document.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
        yield document[:cut]
        document = document[cut:]
    if document.strip():
        yield document
