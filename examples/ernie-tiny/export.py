"""Write the model as transformers saves an ERNIE-4.5 folder, and read such a folder back."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import decode
import tokenizer
import torch
from model import Ernie, Shape
from safetensors.torch import load_file, save_file
from torch import Tensor


def config(shape: Shape) -> dict[str, object]:
    """The contents of config.json."""
    sizes = {field.name: getattr(shape, field.name) for field in fields(Shape)}
    theta = sizes.pop("rope_theta")
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "bos_token_id": tokenizer.BEGIN,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.END,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "ernie4_5_moe",
        **sizes,
        "moe_layer_end_index": shape.num_hidden_layers - 1,
        "moe_layer_interval": 1,
        "moe_num_shared_experts": 0,
        "output_router_logits": False,
        "pad_token_id": tokenizer.UNKNOWN,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "use_bias": False,
        "use_cache": True,
    }


def tensors(model: Ernie) -> dict[str, Tensor]:
    """The checkpoint's tensors by name: bf16, the router and its bias fp32, experts apart."""
    inner = model.shape.moe_intermediate_size
    named: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for j, both in enumerate(value):
                prefix = name.removesuffix("gate_up_proj") + str(j)
                named[f"{prefix}.gate_proj.weight"], named[f"{prefix}.up_proj.weight"] = both.split(inner)
        elif name.endswith("experts.down_proj"):
            for j, down in enumerate(value):
                named[f"{name.removesuffix('down_proj')}{j}.down_proj.weight"] = down
        else:
            named[name] = value
    exact = ("mlp.gate.weight", "e_score_correction_bias")
    kinds = {name: torch.float32 if name.endswith(exact) else torch.bfloat16 for name in named}
    return {name: value.detach().cpu().to(kinds[name]).contiguous() for name, value in named.items()}


def save(model: Ernie, folder: Path, *, pieces: bytes) -> None:
    """Write the whole folder, in place of one that is there, with no moment at which it is half written."""
    written = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    tokenizer.save(written, pieces)
    ends = [tokenizer.END, tokenizer.CHAT_END]
    generation = {"bos_token_id": tokenizer.BEGIN, "eos_token_id": ends, "pad_token_id": tokenizer.UNKNOWN}
    for name, value in (("config", config(model.shape)), ("generation_config", generation)):
        (written / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    save_file(tensors(model), written / "model.safetensors", metadata={"format": "pt"})
    (written / "model.safetensors").chmod(0o644)  # the library makes it readable to its owner only
    if folder.exists():
        replaced = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
        os.rename(written, folder)
        shutil.rmtree(replaced)
    else:
        os.rename(written, folder)


def load(folder: Path) -> Ernie:
    """Read a folder that `save` or quantize.py wrote, weights in fp32."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["rope_theta"] = values["rope_parameters"]["rope_theta"]
    shape = Shape(**{field.name: values[field.name] for field in fields(Shape)})
    model = Ernie(shape)
    if "quantization_config" in values:
        model.load_state_dict(decode.tensors(folder))
        return model
    named = load_file(folder / "model.safetensors")
    for layer in range(shape.moe_layer_start_index, shape.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = [
            {part: named.pop(f"{prefix}{j}.{part}_proj.weight") for part in ("gate", "up", "down")}
            for j in range(shape.moe_num_experts)
        ]
        named[f"{prefix}gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in experts])
        named[f"{prefix}down_proj"] = torch.stack([e["down"] for e in experts])
    model.load_state_dict(named)
    return model
