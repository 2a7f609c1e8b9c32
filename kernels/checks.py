"""What the door checks of the tensors it is given: that an error names the argument, before a kernel reads nonsense."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)


def check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Raise unless `tensor` is of one of `dtypes` and on `device`.

    Raises:
        TypeError: of another dtype.
        ValueError: on another device.
    """
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; expected {expected}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected it on {device}, where the other arguments are")


def check_features(name: str, found: int, expected: int, of: str) -> None:
    """Raise ValueError unless a last dimension is what another argument wants."""
    if found != expected:
        raise ValueError(f"{name} has {found} features; {of} takes {expected}")


def check_array(name: str, array: np.ndarray) -> None:
    """Raise TypeError unless an array of the host is int32."""
    if array.dtype != np.int32:
        raise TypeError(f"{name} is {array.dtype}; expected int32")
