"""Followers on this machine: they serve, they report, and they never outlive rank 0."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from flat_batches import Cache, all_logits, part, step

from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError, ConfigError, EngineDeadError
from engine.execution.executor import Executor
from engine.execution.launch import LocalFollowers
from engine.execution.machine import check_gpus
from engine.execution.parallel import free_address, split_address
from engine.execution.worker import Worker

SECONDS = 60
RANK_0 = """
import sys, time
from engine.config import EngineConfig, ModelConfig
from engine.execution.executor import Executor

if __name__ == "__main__":
    config = EngineConfig(model=sys.argv[1], device="cpu", tensor_parallel_size=2, num_threads=1)
    executor = Executor.start_local(config, ModelConfig.from_folder(config.model))
    print(*executor._followers.pids.values(), flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def folder(random_checkpoint):
    return random_checkpoint("moe-one-shared")[0]


def config(folder, **options) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", num_threads=1, tensor_parallel_size=2, **options)


def start(folder, **options) -> Executor:
    return Executor.start_local(config(folder, **options), ModelConfig.from_folder(folder))


def ended(pid_fd: int) -> bool:
    """Whether a process ends within `SECONDS`; its pidfd becomes readable then, whether or not it is reaped."""
    return bool(select.select([pid_fd], [], [], SECONDS)[0])


def test_serves_until_a_follower_is_killed_and_says_so(folder):
    loaded = []
    executor = Executor.start_local(
        config(folder), ModelConfig.from_folder(folder), progress=lambda what, done, total: loaded.append((done, total))
    )
    assert loaded
    assert loaded == sorted(loaded)
    assert all(0 <= done <= total for done, total in loaded)
    pid = executor._followers.pids[1]
    watch = os.pidfd_open(pid)
    assert all_logits(executor, [5, 6, 7]).shape == (3, 71)
    os.kill(pid, signal.SIGKILL)
    assert ended(watch)
    began = time.monotonic()
    request = Cache(executor).request([1, 2, 3])
    with pytest.raises(EngineDeadError, match="rank 1 died, killed by SIGKILL"):
        step(executor, part(request, 1))
    assert time.monotonic() - began < 20
    with pytest.raises(EngineDeadError, match="rank 1 died"):
        step(executor, part(request, 1))
    executor.shutdown()
    executor.shutdown()


def test_shutdown_ends_followers_without_force(folder):
    executor = start(folder)
    watches = [os.pidfd_open(pid) for pid in executor._followers.pids.values()]
    processes = list(executor._followers._processes.values())
    executor.shutdown()
    assert all(ended(watch) for watch in watches)
    assert [process.exitcode for process in processes] == [0]
    with pytest.raises(EngineDeadError, match="shut down"):
        executor.execute(None)


def test_a_step_that_fails_on_a_follower_is_reported_with_its_cause(folder):
    executor = start(folder)
    request = Cache(executor).request([1, 2, 3])
    request.all_token_ids[1] = 10**6  # beyond the vocabulary's end on rank 1, and nobody's on rank 0
    request.block_table[0] = 10**6
    with pytest.raises(EngineDeadError, match=r"rank 1 failed: [\s\S]*IndexError|index"):
        step(executor, part(request, 3))
    executor.shutdown()


@pytest.mark.parametrize("broken", ["checkpoint", "options"])
def test_a_follower_that_can_not_start_says_why(folder, tmp_path, broken):
    model = ModelConfig.from_folder(folder)
    bad = config(tmp_path) if broken == "checkpoint" else config(folder, max_model_len=100_000)
    followers = LocalFollowers(bad, model, rendezvous=free_address("127.0.0.1"), control_address="tcp://127.0.0.1:1")
    with pytest.raises(CheckpointError if broken == "checkpoint" else ConfigError, match=r"^rank 1: "):
        followers.wait_loaded()
    followers.stop()
    assert not any(process.is_alive() for process in followers._processes.values())


def test_rank_0_that_can_not_start_leaves_no_follower(folder):
    with pytest.raises(ConfigError, match="num_kv_blocks 1"):
        start(folder, num_kv_blocks=1)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("dibit-rank")]


@pytest.mark.parametrize("way", ["killed", "interrupted"])
def test_followers_end_with_rank_0(folder, tmp_path, way):
    script = tmp_path / "rank_0.py"
    script.write_text(RANK_0)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    watches = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
    assert len(watches) == 1
    if way == "killed":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to all of them
    assert all(ended(watch) for watch in watches)
    process.communicate(timeout=SECONDS)


def test_threads_are_limited_in_whichever_thread_runs_the_steps(folder):
    worker = Worker(config(folder).model_copy(update={"tensor_parallel_size": 1}), ModelConfig.from_folder(folder))
    worker.initialize()
    executor = Executor(worker)
    counts = []

    def run() -> None:
        all_logits(executor, [1, 2, 3])
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    executor.shutdown()
    assert counts == [1]


def test_each_thread_that_a_worker_uses_is_set_up(folder):
    """CUDA has a device for each thread by itself too, which must be the rank's when kernels start."""
    one = config(folder).model_copy(update={"tensor_parallel_size": 1})
    worker = Worker(one, ModelConfig.from_folder(folder))
    counts = []

    def run(do) -> None:
        torch.set_num_threads(2)
        do()
        counts.append(torch.get_num_threads())

    for do in (worker.load, worker.connect):
        thread = threading.Thread(target=run, args=(do,))
        thread.start()
        thread.join()
    worker.close()
    assert counts == [1, 1]


def test_ranks_of_one_machine_do_not_share_a_gpu():
    check_gpus(2, 2)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4, and torch sees 2"):
        check_gpus(4, 2)


def test_free_addresses():
    host, port = split_address(free_address("127.0.0.1"))
    assert host == "127.0.0.1"
    assert port > 0
    assert split_address("tcp://[::1]:80") == ("::1", 80)
    for address in ("127.0.0.1:80", "tcp://host", "tcp://:80", "http://host:80", "tcp://host:x"):
        with pytest.raises(ConfigError, match="expected tcp://host:port"):
            split_address(address)
