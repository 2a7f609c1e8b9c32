"""What the launches of `kernels.gpu` have in common, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import gpu

MODULES = sorted(Path(gpu.__path__[0]).glob("*.py"))
AT_LOAD = {"pack.py", "words.py"}
"""They look at values, once, when a weight is loaded."""
WAITING = {"item", "tolist", "cpu", "nonzero", "synchronize", "unique", "masked_select", "is_nonzero"}
"""Methods and functions of torch that wait for the device when they are given one of its tensors."""


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node


def launches() -> list[tuple[str, ast.Call]]:
    """``kernel[grid](...)``"""
    return [(path.name, call) for path in MODULES for call in calls(path) if isinstance(call.func, ast.Subscript)]


def test_every_launch_says_whether_products_and_sums_fuse():
    """Triton's default follows the environment, and the compile checks would check something else."""
    found = launches()
    assert len(found) >= 15
    unsaid = [
        f"{name}:{call.lineno}" for name, call in found if not any(k.arg == "enable_fp_fusion" for k in call.keywords)
    ]
    assert not unsaid


@pytest.mark.parametrize("path", [path for path in MODULES if path.name not in AT_LOAD], ids=lambda path: path.name)
def test_no_module_of_a_step_calls_what_waits_for_the_device(path):
    waiting = [
        f"{path.name}:{call.lineno} .{call.func.attr}()"
        for call in calls(path)
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in WAITING
        # Offsets of numpy arrays, on the host from the start.
        and not (path.name == "metadata.py" and call.func.attr == "tolist")
    ]
    assert not waiting
