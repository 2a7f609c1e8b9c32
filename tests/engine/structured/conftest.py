"""The tokenizer and the grammars of the example model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.structured.compiler import GrammarCompiler
from engine.tokenizer import Tokenizer

MODEL = Path(__file__).parents[3] / "examples" / "ernie-tiny" / "bf16"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL)


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler.of(tokenizer, vocab_size=8192)
    yield compiler
    compiler.close()
