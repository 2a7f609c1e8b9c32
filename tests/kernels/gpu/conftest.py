"""Triton's interpreter runs the kernels on CPU tensors; it has to be chosen before triton is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
