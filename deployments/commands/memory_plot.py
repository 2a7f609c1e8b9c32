"""Memory against context, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from engine.errors import ConfigError
from engine.planning.cards import Card


class Point(Protocol):
    """What a line is drawn through."""

    @property
    def layout(self) -> str:
        """Name of the line."""

    @property
    def context(self) -> int:
        """Tokens."""

    @property
    def tensor_parallel_size(self) -> int:
        """Cards of an engine."""

    @property
    def total(self) -> int:
        """Bytes of one card."""


def plot(points: Sequence[Point], cards: Sequence[Card], path: Path, *, title: str) -> None:
    """Draw a line for each format, and the memory of the cards as horizontal ones.

    Raises:
        ConfigError: matplotlib is not installed, or can't write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(point.layout for point in points):
        line = [point for point in points if point.layout == name]
        label = f"{name} (TP {line[0].tensor_parallel_size})"
        axes.plot([point.context for point in line], [point.total / 1e9 for point in line], marker="o", label=label)
    highest = max((point.total for point in points), default=0)
    for card in cards:
        if card.memory_bytes < 1.6 * highest:
            axes.axhline(card.memory_bytes / 1e9, linestyle=":", linewidth=1, color="gray")
            axes.annotate(card.name, (points[0].context, card.memory_bytes / 1e9), fontsize=7, va="bottom")
    axes.set(xscale="log", xlabel="tokens of each sequence", ylabel="GB of one card", title=title, ylim=(0, None))
    axes.set_xticks(sorted({point.context for point in points}))
    axes.set_xticklabels([f"{context // 1024}K" for context in sorted({point.context for point in points})])
    axes.minorticks_off()
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None
