"""A bf16 model folder -> a quantized one, layer by layer.

A layer goes through four stages (:mod:`engine.compress.observe`). Before each, calibration tokens run through the layer
with the values a server will compute with, as far as they are known, and what the stage's matrices are fed with is
gathered; then these are encoded in that metric, towards what the original model would have put out. So every matrix is
fitted to inputs that carry the errors of all before it. A finished layer is kept in a journal, from which a killed run
goes on.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import names
from engine.checkpoint.loader import ShardedWeights
from engine.checkpoint.writer import FolderWriter
from engine.compress.encode import EncodeOptions, encode, uses_metric
from engine.compress.flow import Calibration, Flow
from engine.compress.journal import Journal, file_states
from engine.compress.layer import LayerWeights, unquantized
from engine.compress.modules import Matrix, check_plan, layer_matrices
from engine.compress.observe import STAGES, stages
from engine.compress.plan import two_bit_plan
from engine.compress.report import GroupSummary, Report
from engine.compress.rotation import RotatedWeights, orthogonal
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedError
from engine.layers.weights import WeightSource
from engine.quantization.config import QuantizationConfig

__all__ = ["Calibration", "GroupSummary", "Report", "quantize_folder", "two_bit_plan"]

ATTENDANTS = ("*token*", "*vocab*", "merges.txt", "*.model", "*.jinja", "generation_config.json", "LICENSE*")
"""Files of a model folder that go along unchanged."""

Progress = Callable[[str, int, int], None]
"""(what is being done, weights quantized so far, all of them)."""

JOURNAL_VERSION = 1


def quantize_folder(
    source: Path,
    target: Path,
    *,
    plan: QuantizationConfig,
    calibration: Calibration | None = None,
    encoding: EncodeOptions | None = None,
    rotation_seed: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize the model in ``source`` and write it to ``target`` under Paddle's names.

    Embedding, head and norms stay bf16, the router fp32; the multi-token prediction module is left out. ``target``
    appears when it is complete; until then the layers that are done stand beside it (:mod:`engine.compress.journal`).
    Memory holds a layer, a shard, and the activations unless they are on the disk.

    Args:
        source: a bf16 model folder, torch or Paddle names.
        target: the folder to write.
        plan: the format of each part, as :class:`engine.compress.plan.Recipe` makes it.
        calibration: tokens to measure errors with; without them, every input of a matrix counts alike.
        encoding: choices that the formats leave open.
        rotation_seed: write the model in a random basis of its residual stream (:mod:`engine.compress.rotation`).
        overwrite: replace ``target`` if it is there, and throw away an unfinished run unless it is resumed.
        resume: go on with an unfinished run. The result has the same bytes as that of a run without a break.
        device: where to compute; the CPU by default.
        progress: told what is done.

    Raises:
        UnsupportedError: ``source`` is quantized already, or a matrix does not fit its format.
        CheckpointError: ``source`` is not sound, ``target`` exists, or the disk is full.
        ConfigError: options that contradict the model, or the unfinished run that is there.
    """
    config = check_folders(source, target, overwrite=overwrite)
    check_plan(config, plan)
    if calibration is not None:
        calibration.check(config)
    device = device or torch.device("cpu")
    encoding = encoding or EncodeOptions()
    fingerprint = {
        "journal version": JOURNAL_VERSION,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "number of threads": torch.get_num_threads(),
        **{f"file {name}": state for name, state in file_states(source, _attendants(source)).items()},
        "plan": plan.to_json(),
        "encoding": repr(encoding),
        "rotation seed": rotation_seed,
        **({} if calibration is None else calibration.describe()),
    }
    try:
        with Journal(target, fingerprint, resume=resume, discard=overwrite) as journal:
            run = _Run(source, config, plan, calibration, encoding, rotation_seed, device, journal, progress)
            try:
                run.layers()
                report = run.publish(target, overwrite=overwrite)
            finally:
                run.close()
            journal.remove()
            return report
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; make room, then go on with --resume" if full else ""
        raise CheckpointError(f"quantizing {source} to {target} stopped: {error}{hint}") from error


def check_folders(source: Path, target: Path, *, overwrite: bool) -> ModelConfig:
    """Check that ``source`` can be quantized and ``target`` written; returns the config of the model.

    Raises:
        UnsupportedError, CheckpointError, ConfigError: as :func:`quantize_folder`.
    """
    config = ModelConfig.from_folder(source)
    if config.quantization:
        raise UnsupportedError(f"{source} is quantized already; expected a folder of bf16 weights")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists; choose another folder, or allow overwriting it (--overwrite)")
    return config


class _Run:
    """One run over the layers."""

    def __init__(
        self,
        source: Path,
        config: ModelConfig,
        plan: QuantizationConfig,
        calibration: Calibration | None,
        encoding: EncodeOptions,
        rotation_seed: int | None,
        device: torch.device,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._config = config
        self._plan = plan
        self._calibration = calibration
        self._encoding = encoding
        self._journal = journal
        self._progress = progress
        self._naming = names.paddle(config.architecture)
        # Encoders go through fp32 by themselves; only computing with the weights asks for more than bf16.
        dtype = torch.float32 if device.type == "cpu" and calibration is not None else torch.bfloat16
        self._weights = _open(source, config, dtype, device, rotation_seed)
        self._plain = _open(source, config, torch.bfloat16, torch.device("cpu"), rotation_seed)
        self._device = device
        self._dtype = dtype
        self._report = Report()
        self._total = sum(
            matrix.num_weights for layer in range(config.num_hidden_layers) for matrix in layer_matrices(config, layer)
        )
        self._done = 0

    def layers(self) -> None:
        """Quantize every layer that is not in the journal."""
        finished = self._journal.finished_layers()
        for layer in range(finished):
            self._report.merge(self._journal.layer(layer)[1])
            self._done += sum(matrix.num_weights for matrix in layer_matrices(self._config, layer))
        if finished == self._config.num_hidden_layers:
            return
        flow = None
        if self._calibration is not None:
            flow = Flow(self._calibration, self._config, self._journal.folder, self._dtype, self._device)
            flow.begin(self._weights.embedding(), finished, self._read, self._decoded)
        for layer in range(finished, self._config.num_hidden_layers):
            original = self._read(layer)
            current = original if flow is None else flow.working_copy(original)
            self._quantize(original, current, layer, flow)
            if flow is not None and layer + 1 < self._config.num_hidden_layers:
                self._tell(f"layers.{layer}: outputs as quantized")
                flow.advance(current, original, layer)

    def publish(self, target: Path, *, overwrite: bool) -> Report:
        """Put the finished layers and everything else together in ``target``."""
        plain, name = self._plain, self._naming.name
        with FolderWriter(target, overwrite=overwrite, temporary=self._journal.folder / "result") as writer:
            writer.add(name("embed_tokens.weight"), plain.embedding())
            for layer in range(self._config.num_hidden_layers):
                self._tell(f"layers.{layer}: into the result")
                for tensor_name, tensor in self._journal.layer(layer)[0].items():
                    writer.add(tensor_name, tensor)
            writer.add(name("norm.weight"), plain.norm("norm"))
            if not self._config.tie_word_embeddings:
                writer.add(name("lm_head.weight"), unquantized(plain.head()).T)  # [H, V]
            raw = json.loads((self._source / "config.json").read_text(encoding="utf-8"))
            described = {"is_quantized": True, "quantization_config": self._plan.to_json()}
            writer.write_json("config.json", raw | described)
            for file in _attendants(self._source):
                if file.name != "config.json":
                    writer.copy(file)
            writer.commit()
            self._report.num_bytes = writer.num_bytes
        return self._report

    def close(self) -> None:
        """Close the files."""
        self._weights.close()
        self._plain.close()

    def _quantize(self, original: LayerWeights, current: LayerWeights, layer: int, flow: Flow | None) -> None:
        """Encode a layer stage by stage; ``current`` becomes what its bytes mean if tokens are to run through it."""
        report = Report()
        tensors = self._unquantized(layer)
        for stage, matrices in stages(layer_matrices(self._config, layer)):
            sums = None
            if flow is not None and any(self._needs_metric(matrix, layer) for matrix in matrices):
                self._tell(f"layers.{layer}: inputs of {stage}")
                sums = flow.observe(stage, matrices, current, original, layer)
                if stage == STAGES[-1]:
                    report.warnings += sums.warnings()
            for matrix in matrices:
                weight_format = self._plan.format(matrix.part, layer)
                weight = original.matrix(matrix)
                target, metric = (weight, None) if sums is None else sums.take(matrix, weight)
                packed = encode(target, metric, weight_format, self._encoding)
                for suffix, tensor in packed.tensors.items():
                    tensors[f"{self._naming.name(matrix.module)}.{suffix}"] = tensor.cpu()
                report.add(matrix, weight, packed, metric=metric, target=target)
                if flow is not None:
                    current.decode(matrix, weight_format, packed.tensors)
                self._done += matrix.num_weights
                self._tell(matrix.module)
        self._journal.add_layer(layer, tensors, report)
        self._report.merge(report)

    def _needs_metric(self, matrix: Matrix, layer: int) -> bool:
        return uses_metric(self._plan.format(matrix.part, layer), self._encoding)

    def _unquantized(self, layer: int) -> dict[str, Tensor]:
        """What stays as it is, by full name."""
        prefix, plain = f"layers.{layer}", self._plain
        kept = {
            f"{prefix}.{norm}.weight": plain.norm(f"{prefix}.{norm}")
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        bias = plain.qkv_bias(layer)
        if bias is not None:
            kept[f"{prefix}.self_attn.qkv_proj.bias"] = bias
        if self._config.is_moe_layer(layer):
            gate, correction = plain.router(layer)
            kept[f"{prefix}.mlp.gate.weight"] = gate.T.contiguous()  # [H, E]
            if correction is not None:
                kept[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = correction[None]  # [1, E]
        return {self._naming.name(name): tensor for name, tensor in kept.items()}

    def _read(self, layer: int) -> LayerWeights:
        self._tell(f"layers.{layer}: reading")
        return LayerWeights(self._weights, self._config, layer)

    def _decoded(self, weights: LayerWeights, layer: int) -> LayerWeights:
        """The layer's weights, replaced by what the journal's bytes mean."""
        self._tell(f"layers.{layer}: outputs as quantized")
        stored, _ = self._journal.layer(layer)
        for matrix in layer_matrices(self._config, layer):
            weight_format = self._plan.format(matrix.part, layer)
            prefix = self._naming.name(matrix.module)
            tensors = {suffix: stored[f"{prefix}.{suffix}"] for suffix in weight_format.tensors(matrix.k, matrix.n)}
            weights.decode(matrix, weight_format, tensors)
        return weights

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._done, self._total)


def _open(
    source: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, rotation_seed: int | None
) -> WeightSource:
    weights = ShardedWeights(source, config, rank=0, world_size=1, dtype=dtype, device=device)
    if rotation_seed is None:
        return weights
    return RotatedWeights(weights, config, orthogonal(config.hidden_size, seed=rotation_seed, device=device))


def _attendants(source: Path) -> list[Path]:
    files = {path for pattern in ATTENDANTS for path in source.glob(pattern) if path.is_file()}
    return sorted({source / "config.json", *files})
