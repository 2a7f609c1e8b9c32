"""What ``quantize_embeddings`` costs ``examples/ernie-tiny``, in bf16 and in 2 bits.

Teacher-forced in the engine on held-out text: KL(with || without) in nats a token, agreement on the likeliest token,
and perplexity. The tables of this model are a much larger part of it than a large model's, and its hidden size is one
group.

    python -m benchmarks.embeddings --write
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quality import TINY, engine_config, rounded, texts
from benchmarks.report import context, write
from benchmarks.teacher import Teacher, compare
from engine.quantization.vocabulary import QuantizeEmbeddings

MODELS = ("bf16", "2bits")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=64, help="of text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of text (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    evaluation = texts(1, options.windows, options.length, options.seed).evaluation
    result = context(["torch"]) | {
        "model": str(TINY.relative_to(TINY.parents[1])),
        "evaluation": {"windows": list(evaluation.shape), "text": "held-out split"},
        "results": [
            _measure(model, how, evaluation) for model in MODELS for how in (None, *get_args(QuantizeEmbeddings))
        ],
    }
    if options.write:
        print(write("embeddings", result), file=sys.stderr)
    _show(result)


def _measure(model: str, how: QuantizeEmbeddings | None, evaluation: torch.Tensor) -> dict[str, Any]:
    config = engine_config(TINY / model, evaluation.shape[1])
    original, rounded_tables = Teacher(config), Teacher(config.model_copy(update={"quantize_embeddings": how}))
    comparison = compare(original, rounded_tables, evaluation)
    original.close()
    rounded_tables.close()
    return {"model": model, "quantize_embeddings": how} | rounded(comparison)


def _show(result: dict[str, Any]) -> None:
    table = Table("model", "quantize_embeddings", "KL, nats/token", "same likeliest token", "perplexity")
    for row in result["results"]:
        error = f"{row['divergence']:.5f} ± {row['divergence_error']:.5f}"
        table.add_row(
            row["model"],
            row["quantize_embeddings"] or "none",
            error,
            f"{row['agreement']:.2%}",
            f"{row['perplexity']:.3f}",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
