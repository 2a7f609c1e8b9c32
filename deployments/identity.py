"""Which model a checkpoint holds, however it is quantized: what must be equal for requests to move between engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from engine.config import ModelConfig
from engine.tokenizer import Tokenizer

FREE_FIELDS = {"quantization", "max_position_embeddings"}
"""Fields of config.json in which checkpoints of one model may differ."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The architecture and the vocabulary of a model."""

    architecture: Mapping[str, object]
    """Fields of :class:`ModelConfig`."""
    vocabulary: str
    """Digest of the bytes and the special tokens that each id stands for."""

    @classmethod
    def of(cls, model: ModelConfig, tokenizer: Tokenizer) -> ModelIdentity:
        """The identity of a model that has been read."""
        return cls(model.model_dump(exclude=FREE_FIELDS), _digest_of_vocabulary(tokenizer))

    @classmethod
    def of_folder(cls, folder: Path) -> ModelIdentity:
        """Read config.json and the tokenizer.

        Raises:
            ConfigError: a file is missing or malformed.
            UnsupportedError: an architecture or a tokenizer that Dibit does not have.
        """
        return cls.of(ModelConfig.from_folder(folder), Tokenizer.from_folder(folder))

    @property
    def digest(self) -> str:
        """Short name of the identity: equal for equal ones."""
        text = repr((sorted(self.architecture.items()), self.vocabulary))
        return sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: ModelIdentity) -> list[str]:
        """What is different here than in ``other``, one phrase each; empty for the same model."""
        found = [
            f"{name} is {value!r} here and {other.architecture.get(name)!r} there"
            for name, value in self.architecture.items()
            if value != other.architecture.get(name)
        ]
        if self.vocabulary != other.vocabulary:
            found.append("the tokenizers differ")
        return found


def _digest_of_vocabulary(tokenizer: Tokenizer) -> str:
    digest = sha256()
    for token_id in range(tokenizer.used_vocab_size):
        content = tokenizer.token_bytes(token_id)
        digest.update(len(content).to_bytes(4, "little") + content)
    digest.update(repr((sorted(tokenizer.special_ids), tokenizer.eos_token_ids)).encode())
    return digest.hexdigest()
