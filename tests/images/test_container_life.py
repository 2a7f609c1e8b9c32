"""What the containers run, as Docker runs it: stopped by SIGTERM, and told in one line why it does not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.images.recipe import ROOT

DIBIT = str(Path(sys.executable).parent / "dibit")
ENVIRONMENT = dict(os.environ, RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
SECONDS = 180
"""That a start may take on a busy machine."""


def test_sigterm_is_an_orderly_end() -> None:
    command = [DIBIT, "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if "Ctrl-C stops it" in line:
                server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=SECONDS) == 0, "".join(said)
    assert said[-1].strip() == "Stopped."


def test_an_engine_that_does_not_start_says_why_in_one_line(tmp_path: Path) -> None:
    text = (ROOT / "serve_config.yaml").read_text(encoding="utf-8")
    config = tmp_path / "serve_config.yaml"
    config.write_text(text.replace("max_num_seqs: 64", "num_kv_blocks: 4"), encoding="utf-8")
    command = [DIBIT, "serve", str(config), "--port", "0"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("Error: ernie-tiny did not come up: the KV cache would hold 4 blocks")
    assert "Traceback" not in done.stderr
