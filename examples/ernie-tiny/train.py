"""Train ernie-tiny from scratch on Python's standard library, on a CPU, in about an hour.

On a CPU, start one process of one thread for each core: threads that share a product wait for each
other in every layer, processes only once a step, which matters where something else runs as well.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from pathlib import Path

import corpus
import export
import optimizer
import tokenizer
import torch
import torch.distributed as dist
from loss import HeadLoss
from model import Ernie, Shape
from stream import BLOCK, Stream
from tokenizer import Tokenizer
from torch import Tensor

BLOCKS = 2  # in a batch: 4096 tokens; with few tokens to learn from, many small steps beat few large ones
LENGTHS, LENGTH_ODDS = (512, 1024, 2048), (0.55, 0.3, 0.15)  # of the sequences a batch is cut into
WARMUP, DECAY = 0.02, 0.6  # shares of the budget: the rate rises, stays, and falls to zero over the last 60 %
BALANCE_RATE = 5e-3  # of the bias a step; it falls with the learning rate
PRODUCTS = torch.bfloat16
PREVIEW = 12  # held-out windows that the progress line's bits per byte come from


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example, on two cores: torchrun --standalone --nproc-per-node 2 train.py --minutes 60 --out bf16. "
        "A run that was stopped goes on with the same command and --resume.",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train for (default 60)")
    parser.add_argument("--tokens", type=float, default=math.inf, help="stop after so many tokens, if that comes first")
    parser.add_argument("--out", type=Path, default=Path("bf16"), help="folder to write; a tokenizer there is kept")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of the checkpoints that --resume needs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --work")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    parser.add_argument("--chat", type=float, default=0.2, help="share of the tokens that are chat (default 0.2)")
    return parser.parse_args()


def find_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """The tokenizer of the folder to write, else of the work folder, else one learnt now, in every process alike."""
    for folder in (options.out, options.work):
        if (folder / "tokenizer.model").exists():
            return Tokenizer.load(folder)
    texts = [source.text for source in corpus.sources(held_out=False)] + corpus.chats(held_out=False, seed=0)
    text = Tokenizer(tokenizer.train(texts))
    tokenizer.save(options.work, text.model)
    return text


def rate(spent: float) -> float:
    """The learning rate's factor when this share of the budget is spent."""
    return min(1.0, spent / WARMUP, max(0.0, 1 - spent) / DECAY)


def chat_ids(text: Tokenizer, chat: str) -> list[int]:
    """Ids of a chat, its last answer tokenized apart: a prompt ends with a space that would join the answer's word."""
    asked, cue, answer = chat.rpartition("\nAssistant: ")
    return text.encode(asked + cue, specials=True) + text.encode(answer, specials=True)


def streams(text: Tokenizer, *, seed: int) -> tuple[Stream, Stream]:
    """The endless sources and chats of training."""
    files = [[tokenizer.BEGIN, *text.encode(source.text), tokenizer.END] for source in corpus.sources(held_out=False)]

    def chats(number: int) -> list[list[int]]:
        return [chat_ids(text, chat) for chat in corpus.chats(held_out=False, seed=seed + number)]

    return Stream(lambda number: list(files), seed=seed), Stream(chats, seed=seed)


def preview_windows(text: Tokenizer) -> tuple[Tensor, int]:
    """A few held-out windows [PREVIEW, BLOCK + 1] and the bytes of their targets."""
    windows = [[tokenizer.BEGIN, *text.encode(source.text)] for source in corpus.sources(held_out=True)]
    ids = [window[: BLOCK + 1] for window in windows if len(window) > BLOCK][:PREVIEW]
    return torch.tensor(ids), sum(len(text.decode(window[1:]).encode()) for window in ids)


@torch.no_grad()
def preview(model: Ernie, windows: tuple[Tensor, int], device: str) -> float:
    """Bits per byte on the held-out windows."""
    nats = 0.0
    for window in windows[0].to(device):
        hidden = model.model(window[None, :-1], PRODUCTS).flatten(0, 1)
        nats += float(HeadLoss.apply(hidden, model.lm_head.weight, window[1:])) * BLOCK
    for mixture in model.mixtures():
        mixture.loads.zero_()
    return nats / math.log(2) / windows[1]


class Run:
    """One training run: model, optimizers, streams, and how far it has come."""

    def __init__(self, options: argparse.Namespace, text: Tokenizer) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.model = Ernie(Shape()).to(options.device)
        self.optimizers = optimizer.make(self.model)
        self.sources, self.chats = streams(text, seed=options.seed)
        self.random = random.Random(options.seed)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def batch(self) -> tuple[Tensor, Tensor]:
        """This process's inputs and targets [sequences, length], the length drawn anew for each batch.

        Every process draws the whole batch, so that their generators and streams stay in step.
        """
        length = self.random.choices(LENGTHS, LENGTH_ODDS)[0]
        pick = [self.chats if self.random.random() < self.options.chat else self.sources for _ in range(BLOCKS)]
        blocks = torch.stack([stream.take() for stream in pick][self.rank :: self.world]).to(self.options.device)
        return blocks[:, :-1].reshape(-1, length), blocks[:, 1:].reshape(-1, length)

    def share(self, loss: Tensor, seconds: float) -> tuple[float, float]:
        """Average gradients, experts' loads, loss and time over the processes."""
        values = [each.grad for each in self.model.parameters() if each.grad is not None]
        values += [mixture.loads for mixture in self.model.mixtures()]
        flat = torch.cat([each.flatten() for each in (*values, loss.detach(), loss.new_tensor(seconds))])
        dist.all_reduce(flat)
        flat /= self.world
        for value, part in zip(values, flat[:-2].split([each.numel() for each in values]), strict=True):
            value.copy_(part.view_as(value))
        return float(flat[-2]), float(flat[-1])

    def update(self, begun: float) -> tuple[float, Tensor]:
        """One step of a run that began at this moment; returns the loss and the experts' shares."""
        inputs, targets = self.batch()
        hidden = self.model.model(inputs, PRODUCTS).flatten(0, 1)
        loss = HeadLoss.apply(hidden, self.model.lm_head.weight, targets.flatten())
        loss.backward()
        mean, self.seconds = float(loss.detach()), time.monotonic() - begun
        if self.world > 1:
            mean, self.seconds = self.share(loss, self.seconds)
        factor = rate(self.spent)
        for each in self.optimizers:
            for group in each.param_groups:
                group["lr"] = group["peak"] * factor
            each.step()
            each.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += inputs.numel() * self.world
        return mean, self.model.balance(BALANCE_RATE * factor)

    @property
    def spent(self) -> float:
        """The share of the budget that is spent."""
        return float(max(self.seconds / (self.options.minutes * 60), self.tokens / self.options.tokens))

    def save(self) -> None:
        """Write a checkpoint in place of the last; one process does."""
        if self.rank:
            return
        self.options.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "positions": (self.sources.position, self.chats.position),
            "random": self.random.getstate(),
            "progress": (self.step, self.tokens, self.seconds),
        }
        torch.save(state, self.options.work / "checkpoint.new")
        (self.options.work / "checkpoint.new").replace(self.options.work / "checkpoint.pt")

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        state = torch.load(self.options.work / "checkpoint.pt", weights_only=False, map_location=self.options.device)
        self.model.load_state_dict(state["model"])
        for each, values in zip(self.optimizers, state["optimizers"], strict=True):
            each.load_state_dict(values)
        self.sources.position, self.chats.position = state["positions"]
        self.random.setstate(state["random"])
        self.step, self.tokens, self.seconds = state["progress"]


def learn(run: Run, text: Tokenizer) -> None:
    """Train until the budget is spent, with a progress line every 40 steps and a checkpoint every 5 minutes."""
    windows = preview_windows(text)
    begun, saved = time.monotonic() - run.seconds, time.monotonic()
    losses: list[float] = []
    last = (run.seconds, run.tokens)
    while run.spent < 1:
        loss, shares = run.update(begun)
        losses.append(loss)
        if run.rank:
            continue
        if run.step % 40 == 0:
            speed = (run.tokens - last[1]) / (run.seconds - last[0])
            print(
                f"step {run.step} spent {run.spent:.1%} tokens {run.tokens / 1e6:.2f}M {speed:.0f} tokens/s "
                f"loss {sum(losses) / len(losses):.3f} shares {shares.min():.3f}..{shares.max():.3f}",
                flush=True,
            )
            losses.clear()
            last = (run.seconds, run.tokens)
        if run.step % 200 == 0:
            print(f"held-out preview: {preview(run.model, windows, run.options.device):.4f} bits per byte", flush=True)
        if time.monotonic() - saved > 300:
            run.save()
            saved = time.monotonic()
    run.save()
    if run.rank == 0:
        print(f"{run.tokens} tokens in {run.seconds:.0f} s, {run.tokens / run.seconds:.0f} tokens/s", flush=True)


def main() -> None:
    """Train and export."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if "RANK" in os.environ:  # torchrun started this process
        dist.init_process_group("gloo")
    text = find_tokenizer(options)
    run = Run(options, text)
    if options.resume:
        run.restore()
    learn(run, text)
    if run.rank == 0:
        export.save(run.model, options.out, pieces=text.model)
        print(f"wrote {options.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
