"""Random checkpoints and rank processes, made once; the conftest.py of a folder that needs them imports them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from random_checkpoints import VARIANTS, save
from rank_pool import RankPool
from transformers import PreTrainedModel

Saved = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Name of a variant -> (its folder, transformers' model of it), written when first asked for."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, save(next(v for v in VARIANTS if v.name == name), folder)
        return made[name]

    return get


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Processes for up to four ranks."""
    pool = RankPool(4)
    yield pool
    pool.close()
