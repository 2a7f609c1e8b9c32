"""The multi-token prediction module of ERNIE-4.5: one decoder layer that guesses the token after the next.

Its input is ``linear_proj([norm(embedding of the next token) | norm(last hidden state)])``. Repositories keep it among
the decoder's tensors, under the decoder's root or without one, or in a folder ``mtp/``; or have none. The decoder does
not use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.checkpoint import names
from engine.checkpoint.folders import Checkpoint
from engine.checkpoint.reader import FLOATS
from engine.config import ModelConfig
from engine.errors import CheckpointError

FOLDER = "mtp"
_EMBEDDING_NORM = "mtp_emb_norm.0.weight"
_HIDDEN_NORM = "mtp_hidden_norm.0.weight"
_LINEAR = "mtp_linear_proj.0.weight"
_BLOCK = "mtp_block.0."


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """The module's own weights, in the dtype they are stored in.

    Attributes:
        embedding_norm: [H].
        hidden_norm: [H].
        linear_proj: [H, 2H], output features first; the first H inputs are the embedding.
        block: names, without prefix, of the tensors of its decoder layer (``self_attn.o_proj.weight``, ...).
        num_bytes: of all its tensors.
    """

    embedding_norm: Tensor
    hidden_norm: Tensor
    linear_proj: Tensor
    block: tuple[str, ...]
    num_bytes: int


def read_mtp(folder: str | Path, config: ModelConfig) -> MtpWeights | None:
    """The module of a model folder; None if it has none.

    Args:
        folder: a model folder, whole or cut into rank folders.
        config: its config.

    Raises:
        CheckpointError: a part of the module is missing or of another shape, or the files are damaged.
    """
    checkpoint = Checkpoint(folder)
    try:
        weights = _read(checkpoint, config.hidden_size)
    finally:
        checkpoint.close()
    inner = Path(folder) / FOLDER
    return read_mtp(inner, config) if weights is None and inner.is_dir() else weights


def _read(checkpoint: Checkpoint, hidden_size: int) -> MtpWeights | None:
    module = {name[name.index("mtp_") :]: name for name in checkpoint if name.startswith(names.MTP)}
    if not module:
        return None
    return MtpWeights(
        embedding_norm=_norm(checkpoint, _full(checkpoint, module, _EMBEDDING_NORM), hidden_size),
        hidden_norm=_norm(checkpoint, _full(checkpoint, module, _HIDDEN_NORM), hidden_size),
        linear_proj=_linear(checkpoint, _full(checkpoint, module, _LINEAR), hidden_size),
        block=tuple(sorted(name.removeprefix(_BLOCK) for name in module if name.startswith(_BLOCK))),
        num_bytes=sum(map(checkpoint.num_bytes, module.values())),
    )


def _full(checkpoint: Checkpoint, module: dict[str, str], name: str) -> str:
    if name not in module:
        raise CheckpointError(
            f"{checkpoint.folder} has a multi-token prediction module without {name!r}; it has {_some(module)}"
        )
    return module[name]


def _some(module: Iterable[str]) -> str:
    return ", ".join(sorted(module)[:4])


def _norm(checkpoint: Checkpoint, name: str, hidden_size: int) -> Tensor:
    return checkpoint.read_replicated(name, shape=(hidden_size,), dtypes=FLOATS).clone()


def _linear(checkpoint: Checkpoint, name: str, hidden_size: int) -> Tensor:
    """[out, in]; its two sizes differ, so the shape tells how it stands in the file, whatever the naming."""
    stored = (2 * hidden_size, hidden_size)  # [in, out]
    if checkpoint.parts[0].info(name).shape == stored:
        return checkpoint.read_replicated(name, shape=stored, dtypes=FLOATS).T.contiguous()
    return checkpoint.read_replicated(name, shape=stored[::-1], dtypes=FLOATS).clone()
