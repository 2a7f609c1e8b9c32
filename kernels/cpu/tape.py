"""Recording what is done once, so that it can be done again without Python: a step of a hundred kernels by a few calls.

Preparing a kernel takes Python longer than many kernels take to run, and while it does the helping threads fall asleep.
Like a CUDA graph, a tape repeats the same kernels at the same addresses; whoever plays it writes new values into the
tensors that were read first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.cpu.threads import Program, Stage, listener

READING = frozenset(
    {
        *(Tensor.__array__, Tensor.__bool__, Tensor.__float__, Tensor.__index__, Tensor.__int__),
        *(Tensor.item, Tensor.nonzero, Tensor.numpy, Tensor.tolist, torch.nonzero),
    }
)
"""What tells Python a value, which then may decide what is done next."""


class UnrecordableError(RuntimeError):
    """Something depends on a value, and so can't be repeated without asking again."""


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Do something, and return what does it again, on the same memory.

    Args:
        run: operations of this backend and of torch on CPU tensors, which may be done twice: the first time, what is
            made once and kept is not on the tape. What they do must not depend on values.

    Returns:
        What repeats them. All tensors that were made meanwhile are kept for that.

    Raises:
        UnrecordableError: a value was asked for.
    """
    run()
    tape = Tape()
    token = listener.set(tape)
    try:
        with _NoReading(), _Watch(tape):
            run()
    finally:
        listener.reset(token)
    return tape.player()


class Tape:
    """What was done, in its order: compiled kernels and operations of torch."""

    def __init__(self) -> None:
        self._parts: list[list[Stage] | Callable[[], None]] = []
        self._made: list[Tensor] = []

    def ran(self, stages: Sequence[Stage]) -> None:
        """Note kernels; those that follow each other become one call."""
        if self._parts and isinstance(last := self._parts[-1], list):
            last.extend(stages)
        else:
            self._parts.append(list(stages))

    def called(self, operation: Callable[[], None]) -> None:
        """Note an operation of torch."""
        self._parts.append(operation)

    def made(self, tensors: Sequence[Tensor]) -> None:
        """Keep tensors, whose addresses kernels have."""
        self._made += tensors

    def player(self) -> Callable[[], None]:
        """Does it again."""
        parts = tuple(Program(part).run if isinstance(part, list) else part for part in self._parts)
        made = tuple(self._made)

        def play(_: tuple[Tensor, ...] = made) -> None:
            for part in parts:
                part()

        return play


class _NoReading(TorchFunctionMode):
    """Refuses to tell values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READING:
            raise UnrecordableError(f"Tensor.{func.__name__} tells a value, which may be another one the next time")
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Notes operations that compute something; new tensors are kept, whatever made them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler only to keep it out: two seconds of every start.
        return False

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise UnrecordableError(f"{func} tells a value, which may be another one the next time")
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._tape.made(results)
        if func._schema.is_mutable:
            self._tape.called(lambda: func(*args, **kwargs))
            return result
        # By the memory: whether `to` and `reshape` copy, their schemas don't say.
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        views = all(tensor.untyped_storage().data_ptr() in known for tensor in results)
        if func.overloadpacket not in _EMPTY and not views:

            def again() -> None:
                fresh = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for target, source in zip(results, fresh, strict=True):
                    target.copy_(source)

            self._tape.called(again)
        return result


_EMPTY = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
"""Room without values."""
