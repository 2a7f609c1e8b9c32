"""Ask the model one question; a check by eye that needs no server."""

from __future__ import annotations

import argparse
from pathlib import Path

import export
import tokenizer
import torch
from model import Ernie
from tokenizer import Tokenizer

ENDS = (tokenizer.END, tokenizer.CHAT_END)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Example: python chat.py "What does os.path.join do?" --temperature 0.7'
    )
    parser.add_argument("questions", nargs="+", help="each is asked in a chat of its own")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "bf16", help="folder of the model")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer (default 160)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    return parser.parse_args()


@torch.no_grad()
def answer(model: Ernie, prompt: list[int], *, temperature: float, max_tokens: int) -> list[int]:
    """Ids of the answer, the end token included if it came. Padding rows of the head are never chosen."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens and ids[-1] not in ENDS:
        logits = model(torch.tensor([ids]))[0, -1, : tokenizer.USED]
        if temperature > 0:
            ids.append(int((logits / temperature).softmax(-1).multinomial(1)))
        else:
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def main() -> None:
    """Answer each question."""
    options = arguments()
    torch.manual_seed(options.seed)
    model, text = export.load(options.folder), Tokenizer.load(options.folder)
    for question in options.questions:
        prompt = text.encode(f"<|begin_of_sentence|>User: {question}\nAssistant: ", specials=True)
        ids = answer(model, prompt, temperature=options.temperature, max_tokens=options.max_tokens)
        print(f"User: {question}\nAssistant: {text.decode(ids)}" + ("" if ids[-1] in ENDS else " [cut]"), end="\n\n")


if __name__ == "__main__":
    main()
