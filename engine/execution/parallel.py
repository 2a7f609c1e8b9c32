"""The ranks of one engine and what they do together: sums and gathers of tensors."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import ConfigError, EngineDeadError

START_TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others to load their weights."""
POLL_SECONDS = 0.02
STEP_TIMEOUT = timedelta(minutes=2)
"""How long a rank waits for the others in one collective operation of a step."""


class TensorParallelGroup:
    """The ranks that share a model. With one rank every operation is a no-op.

    ``torch.distributed`` has one default group in a process, so a process holds one group of several ranks at a time.

    Args:
        rank: this process, 0 ... world_size - 1.
        world_size: number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not among 0 ... {world_size - 1}")
        self.rank = rank
        self.world_size = world_size
        self._connected = False

    def connect(self, rendezvous: str, device: torch.device, check: Callable[[], None] | None = None) -> None:
        """Meet the other ranks: blocks until all of them call this, so call it after the weights are loaded.

        Args:
            rendezvous: "tcp://host:port" where rank 0 listens; see `free_address`.
            device: compute device; decides between gloo (CPU) and NCCL.
            check: called many times a second while waiting; raises if that is in vain.

        Raises:
            ConfigError: the address is malformed, or this process has a group already.
            EngineDeadError: the others did not come within `START_TIMEOUT`, or were lost.
        """
        if self.world_size == 1:
            return
        if dist.is_initialized():
            raise ConfigError("this process already runs an engine of several ranks; start another process for another")
        host, port = split_address(rendezvous)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but torch's stubs do not export it
                host, port, self.world_size, self.rank == 0, START_TIMEOUT, wait_for_workers=False
            )
            self._wait_for_all(store, check)
            dist.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=STEP_TIMEOUT,
                device_id=None if device.type == "cpu" else device,
            )
        except (RuntimeError, ValueError) as error:
            raise EngineDeadError(f"rank {self.rank} could not join the others at {rendezvous}: {error}") from error
        self._connected = True

    def _wait_for_all(
        self,
        store: dist.Store,  # type: ignore[name-defined]  # public as well, and as little exported
        check: Callable[[], None] | None,
    ) -> None:
        """Until every rank is here. The group's own timeout is short: times of loading must not count towards it."""
        store.set(f"loaded/{self.rank}", "1")
        loaded = [f"loaded/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + START_TIMEOUT.total_seconds()
        while not store.check(loaded):
            if check is not None:
                check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all {self.world_size} ranks came within {START_TIMEOUT}")
            time.sleep(POLL_SECONDS)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place, the same to the bit on all of them; returns `x`."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """`x` of every rank, in order, on rank 0; None elsewhere. All have the same shape."""
        if self.world_size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts)
        return parts

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest value of any rank."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def close(self) -> None:
        """Leave the group; may be called again."""
        if self._connected:
            self._connected = False
            dist.destroy_process_group()


def free_address(host: str) -> str:
    """ "tcp://host:port" with a port that is free on `host`, an address of this machine.

    The port is not held: use the address soon, and start anew where somebody else took it in between.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """ "tcp://host:port" -> (host, port).

    Raises:
        ConfigError: it is something else.
    """
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is not an address; expected tcp://host:port")
    return host.strip("[]"), int(port)
