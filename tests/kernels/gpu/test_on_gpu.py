"""On a machine with a GPU: the kernels themselves, compiled and run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_agree_with_the_reference_on_a_gpu():
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[2])])
    done = subprocess.run(
        [sys.executable, here / "agreement.py"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
