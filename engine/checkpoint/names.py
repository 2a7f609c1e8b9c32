"""Tensor names of ERNIE-4.5 checkpoints: Paddle's and torch's, from ours.

Ours are Paddle's without the ``ernie.`` in front: ``layers.3.self_attn.qkv_proj``, ``layers.3.mlp.up_gate_proj``,
``layers.3.mlp.experts.5.down_proj``, ``embed_tokens``, ``norm``, ``lm_head``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import CheckpointError

MTP = ("mtp_", "model.mtp_", "ernie.mtp_")
"""Prefixes of the multi-token prediction module, which the decoder does not read."""

_PIECES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Naming:
    """One way to name and lay out the tensors of a checkpoint."""

    kind: str
    root: str
    """What stands in front of every name but ``lm_head``'s."""
    out_in: bool
    """Linears are [out, in] (torch) rather than [in, out] (Paddle)."""
    fused: bool
    """q|k|v and gate|up stand side by side in one tensor, rather than apart."""

    def name(self, ours: str) -> str:
        """The full name of a module or tensor."""
        return ours if ours.split(".", 1)[0] == "lm_head" else f"{self.root}.{ours}"

    def parts(self, ours: str) -> tuple[str, ...]:
        """The full names of the linears that together are ``ours``, in the order of their columns."""
        parent, _, last = ours.rpartition(".")
        if self.fused or last not in _PIECES:
            return (self.name(ours),)
        return tuple(self.name(f"{parent}.{piece}") for piece in _PIECES[last])


TORCH = Naming(kind="torch", root="model", out_in=True, fused=False)
PADDLE = Naming(kind="paddle", root="ernie", out_in=False, fused=True)


def detect(names: Iterable[str]) -> Naming:
    """Which naming the tensors of a checkpoint follow.

    Raises:
        CheckpointError: neither.
    """
    some: list[str] = []
    for name in names:
        for naming in (TORCH, PADDLE):
            if name.startswith(f"{naming.root}."):
                return naming
        some = [*some, name][:3]
    raise CheckpointError(
        f"tensor names like {', '.join(map(repr, some)) or '(none)'} are not those of an ERNIE-4.5 checkpoint; "
        f"expected {TORCH.root}.* (torch) or {PADDLE.root}.* (Paddle)"
    )
