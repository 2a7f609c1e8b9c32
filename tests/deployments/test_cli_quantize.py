"""``dibit quantize`` as its users run it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.cli import main
from engine.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "ernie-tiny" / "bf16"
CONFIG = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "moe_num_experts": 2,
    "moe_k": 1,
    "moe_layer_start_index": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Done:
    returncode: int
    stderr: str


Dibit = Callable[..., Done]


@pytest.fixture
def dibit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dibit:
    """Runs the command in this process."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as ended:
            main(["quantize", *map(str, arguments), "--num-threads", "1", "--device", "cpu"])
        torch.set_num_threads(threads)
        return Done(int(ended.value.code or 0), capsys.readouterr().err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "bf16", layers=3)


def random_model(folder: Path, *, layers: int) -> Path:
    """Random weights under the small model's tokenizer."""
    folder.mkdir()
    for file in TINY.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).bfloat16()

    tensors = {"model.embed_tokens.weight": random(8192, 64), "model.norm.weight": random(64) + 1}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = random(64) + 1
        for piece, width in (("q", 64), ("k", 32), ("v", 32)):
            tensors[f"{prefix}.self_attn.{piece}_proj.weight"] = random(width, 64)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = random(64, 64)
        modules = {"mlp": 128} if layer == 0 else {f"mlp.experts.{expert}": 64 for expert in range(2)}
        for module, width in modules.items():
            for piece in ("gate", "up"):
                tensors[f"{prefix}.{module}.{piece}_proj.weight"] = random(width, 64)
            tensors[f"{prefix}.{module}.down_proj.weight"] = random(64, width)
        if layer:
            tensors[f"{prefix}.mlp.gate.weight"] = random(2, 64).float()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    texts = [f"The number {i} comes before {i + 1}, and after it there are more." for i in range(99)]
    file.write_text("\n".join(json.dumps({"text": each}) for each in texts))
    return file


def fails(done: Done, *mentioned: str) -> None:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    for part in mentioned:
        assert part in line


def test_a_model_of_few_bits(dibit: Dibit, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = dibit(model, "--out", out, "--calibration", text, "--num-samples", 9, "--sequence-length", 16)
    assert done.returncode == 0, done.stderr
    for shown in ("attention", "wint8", "routed experts", "wint4", "wint2", "error of the outputs", str(out)):
        assert shown in done.stderr
    quantization = ModelConfig.from_folder(out).quantization
    assert quantization is not None
    assert quantization["quantization"] == "wint2"
    assert (out / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    fails(dibit(out, "--out", tmp_path / "again"), "quantized already")
    fails(dibit(model, "--out", out, "--calibration", text, "--sequence-length", 16), "exists", "--overwrite")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--method", "bpdq", "--bits", "3", "--group-size", "32"], "bitplane"),
        (["--method", "bpdq", "--nested"], "bitplane"),
        (["--method", "gptq", "--dense", "wint4"], "gptq"),
        (["--method", "rtn", "--bits", "4"], "wint4"),
        (["--no-calibration", "--wint4-layers", "0"], "wint2"),
    ],
)
def test_methods(dibit: Dibit, model: Path, text: Path, tmp_path: Path, options: list[str], name: str) -> None:
    calibration = [] if {"rtn", "--no-calibration"} & set(options) else ["--calibration", text, "--sequence-length", 16]
    done = dibit(model, "--out", tmp_path / "out", *options, *calibration, "--num-samples", 4)
    assert done.returncode == 0, done.stderr
    assert name in done.stderr
    assert ("error of the outputs" in done.stderr) == bool(calibration)


def test_the_standard_library_stands_in_for_a_text(dibit: Dibit, model: Path, tmp_path: Path) -> None:
    options = ["--method", "gptq", "--num-samples", 2, "--sequence-length", 16, "--trusted-tokens", 100]
    done = dibit(model, "--out", tmp_path / "out", *options, "--calibration-exclude", "[a-z]*/*")
    assert done.returncode == 0, done.stderr
    assert "Python's standard library" in done.stderr
    assert "Warning: layer 1: 2 experts saw fewer than 100 calibration tokens" in done.stderr


def test_what_is_wrong_is_said(dibit: Dibit, model: Path, text: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    fails(dibit(tmp_path / "nowhere", *out), "config.json does not exist")
    fails(dibit(model, *out, "--bits", 3), "ccq has no format of 3 bits")
    fails(dibit(model, *out, "--calibration", tmp_path / "absent"), "absent can't be read")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    fails(dibit(model, *out, "--calibration", short), "less than one sequence of 128")
    fails(dibit(model, *out, "--calibration", text, "--sequence-length", 129), "max_position_embeddings 128")
    fails(dibit(model, *out, "--calibration", text, "--method", "rtn", "--bits", 4), "rtn takes none")
    fails(dibit(model, *out, "--quantization-config", tmp_path / "absent"), "absent can't be read")
    fails(dibit(model, *out, "--group-size", 48, "--method", "gptq"), "48")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "text.jsonl"]


def test_ctrl_c_keeps_what_is_done(dibit: Dibit, text: Path, tmp_path: Path) -> None:
    model = random_model(tmp_path / "bf16", layers=16)  # so many that the last is not done before the signal comes
    out = tmp_path / "out"
    options = [model, "--out", out, "--calibration", text, "--sequence-length", 16, "--batch-tokens", 16]
    command = [sys.executable, "-m", "deployments.cli", "quantize", *map(str, options), "--num-threads", "1"]
    environment = os.environ | {"COLUMNS": "300", "TTY_INTERACTIVE": "0", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    first = tmp_path / ".out.quantize" / "layer-00000.safetensors"
    while not first.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert "--resume goes on" in shown
    fails(dibit(*options), "unfinished run", "--resume", "--overwrite")
    assert dibit(*options, "--resume").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "out", "text.jsonl"]
