"""A model by the name of its repository: its folder, fetched from the Hugging Face hub where it is not there yet."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import CheckpointError

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""config.json, indexes, and what a tokenizer needs. The patterns reach into folders (rank0/, mtp/)."""
WEIGHTS = ("*.safetensors",)
"""Pickled weights are never fetched."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repository(model: str) -> bool:
    """Whether ``model`` could be the name of a repository, "organisation/name"."""
    return _REPOSITORY.fullmatch(model) is not None


def resolve_model(
    model: str | Path,
    revision: str | None = None,
    *,
    weights: bool = True,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder of a model: ``model`` itself if there is such a folder, else that of a repository.

    A repository comes into the hub library's cache (``HF_HOME``), with the library's own progress bars and, for
    private repositories, its token (``hf auth login`` or ``HF_TOKEN``); a later call takes what is there.

    Args:
        model: a path, or "organisation/name".
        revision: branch, tag or commit of the repository; None is its main branch.
        weights: False fetches only the configuration and the tokenizer.
        cache_dir: another place than the library's cache.
        endpoint: another hub; None is ``HF_ENDPOINT``, or https://huggingface.co.

    Raises:
        CheckpointError: there is neither such a folder nor such a repository within reach.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name = str(model)
    if not is_repository(name):
        raise CheckpointError(
            f"there is no folder {name!r}; give the path of a model folder, or the name of a repository of the "
            "Hugging Face hub, like baidu/ERNIE-4.5-0.3B-PT"
        )
    return _fetch(name, revision, weights=weights, cache_dir=cache_dir, endpoint=endpoint)


def _fetch(name: str, revision: str | None, *, weights: bool, cache_dir: Path | None, endpoint: str | None) -> Path:
    # Imported here: models in folders, which is most of them, should not wait for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    looked = f"there is no folder {name!r}, and the repository of that name"
    patterns = [*SMALL_FILES, *WEIGHTS] if weights else list(SMALL_FILES)
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache_dir, endpoint=endpoint, allow_patterns=patterns)
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{looked} asks its users to agree to its terms: accept them on its page at the hub, then log in "
            "(hf auth login, or HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{looked} has no revision {revision!r}; give a branch, tag or commit of it") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{looked} does not exist at the hub, or is private; check the name, or log in (hf auth login, or HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{looked} is not in the local cache, and the hub can't be reached (no network, or HF_HUB_OFFLINE is set); "
            "give the path of a downloaded folder, or fetch it where there is a network (hf download)"
        ) from None
    except Exception as error:  # the library's ways to fail are many: HTTP, disk, locks, a snapshot only half there
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise CheckpointError(f"{looked} could not be fetched: {type(error).__name__}: {reason}") from None
