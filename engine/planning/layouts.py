"""Formats of a whole model, by one name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.quantization.bf16 import Bf16
from engine.quantization.bitplane import Bitplane
from engine.quantization.config import Part, QuantizationConfig, Rule
from engine.quantization.grouping import WORD_ROWS
from engine.quantization.vocabulary import QuantizeEmbeddings
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

LayoutName = Literal["stored", "bf16", "wint8", "wint4", "wint2", "tight", "bpdq"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
EMBEDDINGS: tuple[str, ...] = ("bf16", *get_args(QuantizeEmbeddings))
FIRST_IN_WINT4 = 4
"""Of Baidu's 2-bit checkpoints, the MoE layers whose experts have 4 bits: layers 3 to 6 of the 300B."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The format of every part.

    Attributes:
        name: of the layout.
        formats: of the layers.
        embeddings: how token embedding and logits' projection are rounded while loading; None keeps them in bf16.
        one_codebook: every WINT2 matrix has one codebook for all its columns, as ``dibit quantize`` writes them; a GPU
            then keeps none for each (``kernels.gpu.pack``). Baidu's files may have one a column.
    """

    name: str
    formats: QuantizationConfig
    embeddings: QuantizeEmbeddings | None
    one_codebook: bool = False


def find_layout(
    name: str, model: ModelConfig, *, planes: Literal[2, 3, 4] = 2, group_size: int = 256, embeddings: str | None = None
) -> Layout:
    """The layout of that name for a model.

    "bf16", "wint8" and "wint4" have all linears in that format. "wint2" is that of Baidu's 2-bit checkpoints: WINT8,
    and experts in WINT4 in the first four MoE layers, then in WINT2. "tight" is for few cards: experts in WINT2 in all
    layers, all else in WINT4. "bpdq" has all linears in ``planes`` bit planes of ``group_size``, or of the largest
    smaller size that divides a part's rows. "stored" is what the model's config.json says. Embedding and head are in
    bf16, in "tight" and "bpdq" rounded to "int4", unless ``embeddings`` says otherwise ("bf16", "int8", "int4").

    Raises:
        ConfigError: no such layout, or a format that the model's shapes don't allow.
    """
    wint2 = Wint2("plain")
    small = name in ("tight", "bpdq")
    plain = {"bf16": Bf16(), "wint8": Wint8(), "wint4": Wint4()}
    chosen = embeddings or ("int4" if small else "bf16")
    if chosen not in EMBEDDINGS:
        raise ConfigError(f"quantize_embeddings: {chosen!r} is none of {', '.join(EMBEDDINGS)}")
    if name == "wint2":
        if model.moe is None:
            raise ConfigError(
                "format wint2 is for routed experts, and the model has none; bpdq has 2 bits for any linear"
            )
        last = min(model.moe.layer_start_index + FIRST_IN_WINT4 - 1, model.num_hidden_layers - 2)
        experts = (Rule("experts", Wint4(), 0, last), Rule("experts", wint2, last + 1))
        formats = QuantizationConfig.of(dense=Wint8(), experts=experts)
    elif name == "tight":
        formats = QuantizationConfig.of(dense=Wint4(), experts=wint2)
    elif name == "bpdq":
        formats = QuantizationConfig(
            tuple(Rule(part, _bitplane(planes, group_size, rows)) for part, rows in _rows(model).items())
        )
    elif name == "stored":
        formats = QuantizationConfig.from_json(model.quantization)
    elif name in plain:
        formats = QuantizationConfig.of(dense=plain[name], experts=plain[name])
    else:
        raise ConfigError(f"format: {name!r} is none of {', '.join(LAYOUTS)}")
    rounded = cast("QuantizeEmbeddings", chosen) if chosen != "bf16" else None
    return Layout(name, formats, rounded, one_codebook=name == "tight")


def _rows(model: ModelConfig) -> dict[Part, tuple[int, ...]]:
    """Input features of the matrices of each part."""
    hidden, moe = model.hidden_size, model.moe
    rows: dict[Part, tuple[int, ...]] = {
        "attention": (hidden, model.num_attention_heads * model.head_dim),
        "mlp": (hidden, model.intermediate_size),
    }
    if moe is not None:
        rows["experts"] = (hidden, moe.intermediate_size)
        if moe.num_shared_experts:
            rows["shared_experts"] = (hidden, moe.shared_intermediate_size)
    return rows


def _bitplane(planes: Literal[2, 3, 4], group_size: int, rows: tuple[int, ...]) -> Bitplane:
    sizes = range(group_size, 0, -WORD_ROWS)
    fitting = next((size for size in sizes if not any(count % size for count in rows)), group_size)
    return Bitplane(planes=planes, group_size=fitting)
