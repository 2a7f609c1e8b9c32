"""A run that is killed, stopped or out of disk space goes on and ends with the bytes of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.compress.journal import work_folder
from engine.compress.layer import LayerWeights, SequenceRunner
from engine.compress.observe import ObserveOptions
from engine.compress.pipeline import Calibration, quantize_folder
from engine.compress.plan import Recipe
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.execution.parallel import TensorParallelGroup
from engine.models import model_builder

Write = Callable[..., dict[str, Tensor]]
SMALL = {"num_hidden_layers": 4, "moe_num_experts": 3, "moe_intermediate_size": 128, "moe_num_shared_experts": 1}
TOKENS = torch.randint(0, 101, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Write) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "bf16"
    write_checkpoint(folder, **SMALL)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, bytes]:
    target = source.with_name("undisturbed")
    run(source, target)
    return contents(target)


def run(source: Path, target: Path, activations: str = "memory", **options: Any) -> None:
    plan = Recipe(method="gptq").plan(ModelConfig.from_folder(source))
    observe = ObserveOptions(match_original=True)  # which keeps two streams of activations
    calibration = Calibration(TOKENS, observe, activations=activations, batch_tokens=48)
    quantize_folder(source, target, plan=plan, calibration=calibration, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_process(
    source: Path, target: Path, options: dict[str, Any], largest_file: int | None, events: Connection
) -> None:
    """Sends what is done, then how it ended."""
    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def tell(what: str, *_: int) -> None:
        events.send(what)
        events.recv()  # the test lets it go on

    try:
        run(source, target, progress=tell, **options)
        events.send("done")
    except CheckpointError as error:
        events.send(f"error: {error}")


@pytest.fixture(scope="module")
def start() -> Callable[..., tuple[Any, Iterator[str]]]:
    context = multiprocessing.get_context("forkserver")  # a fresh process without importing torch each time
    context.set_forkserver_preload(["engine.compress.pipeline"])

    def begin(source: Path, target: Path, largest_file: int | None = None, **options: Any) -> tuple[Any, Iterator[str]]:
        here, there = context.Pipe()
        process = context.Process(target=in_process, args=(source, target, options, largest_file, there))
        process.start()
        there.close()

        def events() -> Iterator[str]:
            try:
                while True:
                    event = here.recv()
                    here.send(None)
                    yield event
            except (EOFError, BrokenPipeError, ConnectionResetError):
                process.join()

        return process, events()

    return begin


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_killed_at_any_moment(start, source, undisturbed, tmp_path, activations):
    target = tmp_path / "out"
    moments = random.Random(activations)
    kills = 0
    last = ""
    while last != "done":
        process, events = start(source, target, activations=activations, resume=True)
        moment = moments.randrange(1, 14)  # a whole run has some 40 events
        for count, event in enumerate(events):
            last = event
            if count == moment and kills < 6:
                time.sleep(moments.uniform(0, 0.01))  # into the step that this event announces
                process.kill()
                kills += 1
        assert last == "done" or (process.exitcode == -9 and not target.exists())
    assert kills >= 4
    assert contents(target) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_the_result_is_put_together(start, source, undisturbed, tmp_path):
    target = tmp_path / "out"
    process, events = start(source, target)
    for what in events:
        if what == "layers.2: into the result":
            process.kill()
    assert not target.exists()
    assert (work_folder(target) / "layer-00003.safetensors").exists()
    run(source, target, resume=True)
    assert contents(target) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("largest_file", "layers"), [(20_000, 0), (400_000, 4)])
def test_a_full_disk(start, source, undisturbed, tmp_path, largest_file, layers):
    target = tmp_path / "out"
    assert max(map(len, undisturbed.values())) > largest_file
    process, events = start(source, target, largest_file)
    *_, last = events
    assert process.exitcode == 0
    assert last.startswith("error: ")
    assert "File too large" in last
    assert not target.exists()
    assert len(list(work_folder(target).glob("layer-*.safetensors"))) == layers
    run(source, target, resume=True)
    assert contents(target) == undisturbed


class Stop(Exception):
    pass


def stop_at(event: str) -> Callable[..., None]:
    def progress(what: str, *_: int) -> None:
        if what == event:
            raise Stop

    return progress


@pytest.fixture
def half_done(source: Path, tmp_path: Path) -> Path:
    """A target whose run stopped in layer 2, its activations on the disk."""
    target = tmp_path / "out"
    with pytest.raises(Stop):
        run(source, target, "disk", progress=stop_at("layers.2: reading"))
    return target


def test_the_next_layer_sees_what_the_quantized_layers_before_it_make(source, half_done):
    config = ModelConfig.from_folder(source)
    raw = (work_folder(half_done) / "inputs-00002.bin").read_bytes()
    found = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(*TOKENS.shape, config.hidden_size)
    run(source, half_done, "disk", resume=True)
    config = ModelConfig.from_folder(half_done)
    fp32 = {"dtype": torch.float32, "device": torch.device("cpu")}
    weights = ShardedWeights(half_done, config, rank=0, world_size=1, **fp32)
    originals = ShardedWeights(source, ModelConfig.from_folder(source), rank=0, world_size=1, **fp32)
    states = weights.embedding()[TOKENS]  # as a server loads it
    runner = SequenceRunner(config, length=TOKENS.shape[1], **fp32)
    builder = model_builder(config, weights, TensorParallelGroup(0, 1), **fp32)
    for layer in range(2):
        states = runner.run(builder.layer(layer), states)
    torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-5)
    original = originals.embedding()[TOKENS]
    for layer in range(2):
        original = runner.run(runner.build(LayerWeights(originals, config, layer), layer), original)
    assert (original - states).abs().max() > 5e-5, "the two streams differ by more than rounding"


def test_an_unfinished_run_is_neither_taken_up_nor_thrown_away_unasked(source, half_done, undisturbed):
    with pytest.raises(ConfigError, match=r"unfinished run with 2 finished layers; .*--resume.*--overwrite"):
        run(source, half_done, "disk")
    run(source, half_done, "disk", overwrite=True)
    assert contents(half_done) == undisturbed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("plan", "plan was"),
        ("tokens", "calibration tokens was"),
        ("options", "observe options was"),
        ("threads", "number of threads was 1, now it is 2"),
        ("source", r"file model\.safetensors was"),
    ],
)
def test_what_was_begun_is_finished_with_the_same_inputs(source, half_done, tmp_path, change, named):
    plan = Recipe(method="gptq", group_size=32 if change == "plan" else 64).plan(ModelConfig.from_folder(source))
    calibration = Calibration(
        TOKENS.flip(0) if change == "tokens" else TOKENS,
        ObserveOptions(weight_by_routing=change != "options"),
        activations="memory",  # where they are kept changes nothing in the result
        batch_tokens=48,
    )
    weights = source / "model.safetensors"
    before = weights.stat()
    if change == "source":
        weights.touch()
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if change == "threads" else threads)
    try:
        with pytest.raises(ConfigError, match=named):
            quantize_folder(source, half_done, plan=plan, calibration=calibration, resume=True)
    finally:
        torch.set_num_threads(threads)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (work_folder(half_done) / "layer-00001.safetensors").exists()


def test_two_runs_at_once_are_refused(source, tmp_path):
    target = tmp_path / "out"

    def second(what: str, *_: int) -> None:
        if what == "layers.1: reading":
            with pytest.raises(ConfigError, match="another process is at work"):
                run(source, target, resume=True)
            raise Stop

    with pytest.raises(Stop):
        run(source, target, progress=second)
