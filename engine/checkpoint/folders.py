"""The folders that make up a checkpoint: the model's own, or one for each rank that the model was cut for.

Baidu's ``-TP2-`` and ``-TP4-`` repositories hold ``rank0/``, ``rank1/``, ... beside ``config.json``. Each has the same
tensor names; matrices, embedding and head are cut (``engine.checkpoint.partition``), everything else is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.reader import CheckpointReader
from engine.errors import CheckpointError

_RANK = re.compile(r"rank(\d{1,5})")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
"""The last rank's rows of the vocabulary may be fewer; all other tensors are cut evenly or not at all."""


class Checkpoint:
    """One or several folders of safetensors files ("parts") with the same tensor names.

    Raises:
        CheckpointError: there are no weights, a rank's folder is missing, or the folders' tensors disagree; as well as
            all that a ``CheckpointReader`` of one of them raises.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        folders = _rank_folders(self.folder)
        self.parts = tuple(CheckpointReader(part) for part in folders or [self.folder])
        for part in self.parts[1:]:
            _check_agreement(self.parts[0], part)

    def __contains__(self, name: str) -> bool:
        return name in self.parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0])

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor, or of its shares in all parts."""
        return sum(part.info(name).num_bytes for part in self.parts)

    def read(self, part: int, name: str, *, shape: tuple[int, ...], dtypes: Collection[str]) -> Tensor:
        """A view of a tensor of one part; see ``CheckpointReader.read``."""
        try:
            return self.parts[part].read(name, shape=shape, dtypes=dtypes)
        except CheckpointError as error:
            if len(self.parts) == 1:
                raise
            raise CheckpointError(
                f"{error} in one of {len(self.parts)} rank folders; if the model was cut for more ranks, some folders "
                "are missing"
            ) from None

    def read_replicated(self, name: str, *, shape: tuple[int, ...], dtypes: Collection[str]) -> Tensor:
        """A view of a tensor that every part has whole.

        Raises:
            CheckpointError: also if the parts' copies differ.
        """
        first = self.read(0, name, shape=shape, dtypes=dtypes)
        for i in range(1, len(self.parts)):
            if not torch.equal(first, self.read(i, name, shape=shape, dtypes=dtypes)):
                raise CheckpointError(
                    f"tensor {name!r} is not the same in {self.parts[0].folder} and {self.parts[i].folder}, though no "
                    "rank has a share of it; the folders are of different checkpoints"
                )
        return first

    def release(self) -> None:
        """Let go of the memory of what was read."""
        for part in self.parts:
            part.release()

    def close(self) -> None:
        """Close the files."""
        for part in self.parts:
            part.close()


def _rank_folders(folder: Path) -> list[Path]:
    """``rank0``, ``rank1``, ... in their order; none if the weights are not cut."""
    if not folder.is_dir():
        return []
    ranks = {
        int(match[1]): path for path in folder.iterdir() if (match := _RANK.fullmatch(path.name)) and path.is_dir()
    }
    if not ranks:
        return []
    whole = sorted(path.name for path in folder.glob("*.safetensors"))
    if whole:
        raise CheckpointError(
            f"{folder} holds both {whole[0]} and weights cut for ranks ({ranks[min(ranks)].name}, ...), and nothing "
            "says which count; move one of them out of the folder"
        )
    missing = [f"rank{rank}" for rank in range(max(ranks) + 1) if rank not in ranks]
    if missing:
        found = ", ".join(ranks[rank].name for rank in sorted(ranks))
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:5])}; it has {found}. Fetch it again")
    return [ranks[rank] for rank in range(len(ranks))]


def _check_agreement(first: CheckpointReader, other: CheckpointReader) -> None:
    for has, lacks in ((first, other), (other, first)):
        name = next((name for name in has if name not in lacks), None)
        if name is not None:
            raise CheckpointError(
                f"{has.folder} has a tensor {name!r}, {lacks.folder} has none; every rank's folder must have the same "
                "tensors"
            )
    for name in first:
        ours, theirs = first.info(name), other.info(name)
        if ours.dtype != theirs.dtype or (ours.shape != theirs.shape and not name.endswith(_VOCABULARY)):
            raise CheckpointError(
                f"tensor {name!r} is {ours.dtype} {list(ours.shape)} in {first.folder} and {theirs.dtype} "
                f"{list(theirs.shape)} in {other.folder}; every rank has an equal share"
            )
