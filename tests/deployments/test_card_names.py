"""What the plan calls a card is what Ray calls it, or an engine would wait for it for ever."""

from __future__ import annotations

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from engine.planning.cards import CARDS

DRIVER_NAMES = {
    "A100-40G": "NVIDIA A100-SXM4-40GB",
    "A100-80G": "NVIDIA A100 80GB PCIe",
    "H100-80G": "NVIDIA H100 80GB HBM3",
    "H200-141G": "NVIDIA H200",
    "H20-96G": "NVIDIA H20",
    "H20-141G": "NVIDIA H20-3e",
    "L20-48G": "NVIDIA L20",
    "4090-24G": "NVIDIA GeForce RTX 4090",
    "3090-24G": "NVIDIA GeForce RTX 3090",
}
"""As NVIDIA's driver reports each card, from which Ray makes its own name."""


@pytest.mark.parametrize("card", CARDS)
def test_cards_have_rays_names(card: str) -> None:
    # Ray has no public function for this; a node finds its own name by it.
    named = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(DRIVER_NAMES[card])
    assert CARDS[card].accelerator_type == named
