"""GPUs, as far as a plan must know them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU.

    Attributes:
        name: as people say it.
        accelerator_type: Ray's name, for a pool; None where Ray has none.
        memory_bytes: what CUDA reports as the total (``torch.cuda.mem_get_info``), which is less than on the box.
        bandwidth: of its memory, bytes a second.
        flops: bf16, dense, operations a second.
    """

    name: str
    accelerator_type: str | None
    memory_bytes: int
    bandwidth: float
    flops: float


def _card(name: str, ray: str | None, *, gib: float, terabytes: float, teraflops: float) -> Card:
    return Card(name, ray, int(gib * GIB), terabytes * 1e12, teraflops * 1e12)


CARDS = {
    card.name: card
    for card in (
        _card("A100-40G", "A100", gib=39.4, terabytes=1.555, teraflops=312),
        _card("A100-80G", "A100", gib=79.2, terabytes=2.039, teraflops=312),
        _card("H100-80G", "H100", gib=79.1, terabytes=3.35, teraflops=990),
        _card("H200-141G", "H200", gib=139.8, terabytes=4.8, teraflops=990),
        _card("H20-96G", "H20", gib=95.0, terabytes=4.0, teraflops=148),
        _card("H20-141G", "H20", gib=139.8, terabytes=4.0, teraflops=148),
        _card("L20-48G", "L20", gib=44.5, terabytes=0.864, teraflops=119.5),
        _card("4090-24G", "GeForce-RTX-4090", gib=23.5, terabytes=1.008, teraflops=165),
        _card("3090-24G", "GeForce-RTX-3090", gib=23.6, terabytes=0.936, teraflops=71),
    )
}
"""Rates from the vendors' data sheets; memory is about what CUDA reports on such a card, the error-correcting bits
taken off. Neither was measured here."""

CUSTOM = re.compile(
    r"^\s*(?P<memory>[\d.]+)\s*GB\s*,\s*(?P<bandwidth>[\d.]+)\s*TB/s\s*,\s*(?P<flops>[\d.]+)\s*TFLOPs\s*$",
    re.IGNORECASE,
)

STOCK = re.compile(r"^\s*(?P<count>[1-9]\d*)\s*[xX]\s*(?P<card>.+)$")


def find_stock(text: str) -> tuple[Card, int | None]:
    """A card, and of "8xH100" or "8 x H100" how many there are; None where no number is given.

    Raises:
        ConfigError: see `find_card`.
    """
    found = STOCK.match(text)
    return (find_card(found["card"]), int(found["count"])) if found else (find_card(text), None)


def find_card(text: str) -> Card:
    """The card called ``text``, or described by it: "80GB, 2.0TB/s, 312TFLOPs" (decimal gigabytes).

    Names may leave out the memory where that is unambiguous ("H100"), and case does not matter.

    Raises:
        ConfigError: there is none, or several.
    """
    if found := CUSTOM.match(text):
        try:
            memory, bandwidth, flops = (float(found[name]) for name in ("memory", "bandwidth", "flops"))
        except ValueError:
            memory = bandwidth = flops = 0.0
        if min(memory, bandwidth, flops) <= 0:
            raise ConfigError(f"gpu: {text!r} has a rate that is not a number above 0")
        return Card(text.strip(), None, int(memory * 1e9), bandwidth * 1e12, flops * 1e12)
    wanted = text.strip().lower().removeprefix("rtx").lstrip("-_ ")
    matches = [card for name, card in CARDS.items() if name.lower() == wanted or name.lower().startswith(f"{wanted}-")]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(CARDS)
    if matches:
        raise ConfigError(f"gpu: {text!r} may be {' or '.join(card.name for card in matches)}; say which")
    raise ConfigError(f'gpu: there is no {text!r}; known are {known}. Or describe it: "80GB, 2.0TB/s, 312TFLOPs"')
