"""Quality against bits a weight, as an SVG for the docs."""

from __future__ import annotations

import io
from typing import Any

MARKERS = {"formats": "s", "baselines": "o", "nested": "^", "ccq": "D"}
COLORS = {"formats": "#777777", "baselines": "#2a6fbb", "nested": "#3a9a5b", "ccq": "#c0392b"}
TITLES = {"formats": "integers", "baselines": "RTN, GPTQ, BPDQ", "nested": "nested planes", "ccq": "CCQ"}


def quality_against_bits(result: dict[str, Any]) -> str:
    """The rows of ``benchmarks.quality`` that share a calibration; bits are those at the 300B's widths.

    Args:
        result: as ``benchmarks.quality`` writes it.

    Returns:
        SVG.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dibit"  # the same drawing has the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for group, title in TITLES.items():
        rows = [
            row
            for row in result["results"]
            if row["group"] == group and row["comparison"]["divergence"] > 1e-6 and row["bits_per_weight_300b"] < 6
        ]
        if not rows:
            continue
        axes.errorbar(
            [row["bits_per_weight_300b"] for row in rows],
            [row["comparison"]["divergence"] for row in rows],
            yerr=[row["comparison"]["divergence_error"] for row in rows],
            fmt=MARKERS[group],
            color=COLORS[group],
            label=title,
            markersize=5,
            capsize=2,
        )
        for row in rows:
            if group != "ccq" or row["name"].startswith(("CCQ default: ", "CCQ best: ")):
                place = (row["bits_per_weight_300b"], row["comparison"]["divergence"])
                axes.annotate(row["name"], place, xytext=(5, 3), textcoords="offset points", fontsize=6.5)
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight of the routed experts, scales included, at the widths of the 300B")
    axes.set_ylabel("KL(BF16 || quantized), nats a token")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend()
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
