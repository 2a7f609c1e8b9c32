"""Names for prefixes: a chain of hashes, one for each full block of a sequence."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16
"""128 bits: by the birthday bound, 2**40 different blocks collide with a probability of about 2**-49."""


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name a full block by all tokens up to its end: ``H(parent hash, tokens)``, blake2b-128.

    A collision would show one user another one's context, so the hash is cryptographic, and Python's ``hash`` won't do.

    Args:
        parent: the hash of the block before, ``b""`` for the first block of a sequence.
        token_ids: the ``block_size`` ids in the block, each within int32.
    """
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Append to ``hashes`` those of the full blocks of ``token_ids`` that it lacks, so each block is hashed once.

    Args:
        hashes: the chain of the first ``len(hashes)`` full blocks of the same sequence.
        token_ids: the sequence so far; its last, partly filled block gets no hash.
        block_size: tokens in a block.
    """
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        hashes.append(block_hash(hashes[-1] if hashes else b"", token_ids[start : start + block_size]))
