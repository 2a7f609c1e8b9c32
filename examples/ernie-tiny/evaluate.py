"""Measure a folder: held-out bits per byte against `xz -9`, and each expert's share of the tokens."""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import math
import os
import platform
import shlex
import sys
from pathlib import Path

import corpus
import export
import tokenizer
import torch
import torch.nn.functional as F
from model import Ernie
from tokenizer import Tokenizer

WINDOW = 2048
STRIDE = 1024  # every token but a document's first thousand sees at least this many before it


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python evaluate.py bf16 --out ../../benchmarks/results/tiny.json. Takes a minute or two.",
    )
    parser.add_argument("folder", type=Path, help="folder of the model, as train.py writes it")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    return parser.parse_args()


@torch.no_grad()
def document_bits(model: Ernie, ids: list[int]) -> float:
    """Bits of the ids after the first, each predicted from at most WINDOW tokens before it."""
    nats, done = 0.0, 1  # ids[:done] need no prediction any more
    while done < len(ids):
        end = min(len(ids), done + (WINDOW if done == 1 else STRIDE))
        begin = max(0, end - 1 - WINDOW)
        hidden = model.model(torch.tensor([ids[begin : end - 1]]), torch.float32)[0]
        logits = model.lm_head(hidden[done - end :])
        nats += float(F.cross_entropy(logits, torch.tensor(ids[done:end]), reduction="sum"))
        done = end
    return nats / math.log(2)


def machine() -> str:
    """The processor and its cores, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, no GPU used, torch {torch.__version__}, Python {platform.python_version()}"


def measure(folder: Path) -> dict[str, object]:
    """All values of a folder. A document begins with <s> and ends with </s>, whose bits count too."""
    model, text = export.load(folder), Tokenizer.load(folder)
    files = corpus.sources(held_out=True)
    documents = [[tokenizer.BEGIN, *text.encode(file.text), tokenizer.END] for file in files]
    bits = sum(document_bits(model, ids) for ids in documents)
    whole = "".join(file.text for file in files).encode()
    shares = model.balance(0.0)
    return {
        "held_out_files": len(files),
        "held_out_bytes": len(whole),
        "held_out_tokens": sum(map(len, documents)) - len(files),
        "bits_per_byte": round(bits / len(whole), 4),
        "bits_per_token": round(bits / (sum(map(len, documents)) - len(files)), 4),
        "xz_bits_per_byte": round(8 * len(lzma.compress(whole, preset=9)) / len(whole), 4),
        "context": f"at most {WINDOW} tokens, stride {STRIDE}",
        "expert_share_min": round(float(shares.min()), 4),
        "expert_share_max": round(float(shares.max()), 4),
        "expert_shares": {
            str(layer): [round(share, 4) for share in row]
            for layer, row in enumerate(shares.tolist(), model.shape.moe_layer_start_index)
        },
    }


def main() -> None:
    """Measure, print, and write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    report = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "values": measure(options.folder),
    }
    written = json.dumps(report, indent=2) + "\n"
    print(written, end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
