"""For all tests, since whichever imports Triton first decides: its interpreter runs the kernels on CPU tensors."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
