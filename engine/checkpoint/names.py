"""Tensor names of checkpoints: Paddle's and torch's, from ours.

Ours are Paddle's without the model's name in front: ``layers.3.self_attn.qkv_proj``, ``layers.3.mlp.up_gate_proj``,
``layers.3.mlp.experts.5.down_proj``, ``embed_tokens``, ``norm``, ``lm_head``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import CheckpointError

MTP = ("mtp_", "model.mtp_", "ernie.mtp_")
"""Prefixes of the multi-token prediction module, which the decoder does not read."""

_CACHE_SCALES = (".cachek_matmul.activation_scale", ".cachev_matmul.activation_scale")
"""Absmax of keys and values of a layer, which the cache of Dibit does not need."""

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
PADDLE_QWEN2 = Naming(kind="paddle", root="qwen2", out_in=False, fused=True)

_ALL = (TORCH, PADDLE, PADDLE_QWEN2)


def paddle(architecture: str) -> Naming:
    """Paddle's names (fused, [in, out]) for a ``ModelConfig.architecture``; the root is FastDeploy's prefix."""
    return PADDLE_QWEN2 if architecture == "qwen2" else PADDLE


def is_extra(name: str) -> bool:
    """Whether a tensor is of a kind that the decoder does not read, so that nobody need wonder about it."""
    return name.startswith(MTP) or name.endswith(_CACHE_SCALES)


def detect(names: Iterable[str]) -> Naming:
    """Which naming the tensors of a checkpoint follow.

    Raises:
        CheckpointError: none of those known.
    """
    some: list[str] = []
    for name in names:
        for naming in _ALL:
            if name.startswith(f"{naming.root}."):
                return naming
        some = [*some, name][:3]
    raise CheckpointError(
        f"tensor names like {', '.join(map(repr, some)) or '(none)'} are not those of a supported checkpoint; expected "
        + " or ".join(f"{naming.root}.* ({naming.kind})" for naming in _ALL)
    )
