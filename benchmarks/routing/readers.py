"""Traces that others have published, as requests."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path

from benchmarks.routing.traces import Request, make_request, name_block

MOONCAKE_BLOCK = 512
"""Tokens that one of Mooncake's ``hash_ids`` stands for."""


def read_azure(path: Path, *, block_size: int, limit: int | None = None, speed: float = 1.0) -> list[Request]:
    """Azure's LLM inference traces (github.com/Azure/AzurePublicDataset, 2023 and 2024): CSV with a header.

    ``TIMESTAMP`` (``2023-11-16 18:15:46.6805900``), ``ContextTokens``, ``GeneratedTokens``. They say nothing of
    prefixes, so none are shared.

    Args:
        path: the file.
        block_size: tokens in a block of the engines.
        limit: requests to read.
        speed: how many times as fast they come.

    Raises:
        ValueError: a column is missing or a line malformed; the message has file and line.
    """
    rows: list[tuple[float, int, int]] = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(islice(csv.DictReader(file), limit), 2):
            try:
                rows.append((_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected TIMESTAMP, ContextTokens and GeneratedTokens, found {row}"
                ) from error
    rows.sort()
    return [
        make_request(
            (when - rows[0][0]) / speed, max(prompt, 1), max(output, 1),
            [name_block(i, k) for k in range((max(prompt, 1) + max(output, 1)) // block_size)],
            block_size=block_size, session=i,
        )
        for i, (when, prompt, output) in enumerate(rows)
    ]  # fmt: skip


def read_mooncake(path: Path, *, block_size: int, limit: int | None = None, speed: float = 1.0) -> list[Request]:
    """Mooncake's traces (github.com/kvcache-ai/Mooncake, FAST25-release): an object a line.

    ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``: one for each 512 tokens of the prompt, each
    naming its tokens and all before them. An engine's block lies within one of them if ``block_size`` divides 512.

    Raises:
        ValueError: ``block_size`` does not divide 512, or a line is malformed; the message has file and line.
    """
    if MOONCAKE_BLOCK % block_size:
        raise ValueError(f"block size {block_size} does not divide {MOONCAKE_BLOCK}, the tokens of one of the hash_ids")
    parts = MOONCAKE_BLOCK // block_size
    requests = []
    for number, line in islice(_lines(path), limit):
        try:
            entry = json.loads(line)
            prompt, output = max(int(entry["input_length"]), 1), max(int(entry["output_length"]), 1)
            names = [(1 << 60 | int(one), part) for one in entry["hash_ids"] for part in range(parts)]
            when = float(entry["timestamp"]) / 1000.0
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: expected timestamp, input_length, output_length and hash_ids, found {line:.99}"
            ) from error
        hashes = [name_block(*name) for name in names[: prompt // block_size]]
        own = (1 << 61) | number
        hashes += [name_block(own, k) for k in range(len(hashes), (prompt + output) // block_size)]
        requests.append(make_request(when / speed, prompt, output, hashes, block_size=block_size, session=number))
    requests.sort(key=lambda request: request.arrival_s)
    return requests


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _seconds(stamp: str) -> float:
    """Azure writes seven digits of a second; datetime takes six."""
    whole, _, fraction = stamp.strip().partition(".")
    digits = fraction.split("+")[0].rstrip("Z")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + (float(f"0.{digits}") if digits else 0.0)
