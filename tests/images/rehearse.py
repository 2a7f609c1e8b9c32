"""Runs the Dockerfile's own commands without a container engine, then starts what it says and asks for a text.

    python tests/images/rehearse.py             the CPU image
    python tests/images/rehearse.py cuda        the CUDA image, whose engine then runs on the CPU

Folders of the image become folders of a temporary one; what needs root (apt, useradd) is left out, and mounts of a
cache. Takes minutes: it installs everything anew, from the network, into some gigabytes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.images.recipe import Stage, inherited, lineage  # noqa: E402  # the root is no package to install

FOLDERS = ("/opt/venv", "/opt/dibit", "/requirements", "/wheels", "/src")
"""Of the image; the rest is the system's."""
SECONDS = 300
"""To come up."""

TRITON_TOOLS = """
import shutil, subprocess, triton
ptxas = triton.knobs.nvidia.ptxas.path
print("triton", triton.__version__, ptxas, shutil.which("gcc") or shutil.which("clang"))
print(subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
"""


def main() -> int:
    target = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    with tempfile.TemporaryDirectory(prefix="dibit-image-") as folder:
        return Rehearsal(Path(folder)).run(target)


class Rehearsal:
    """An image in a folder, made stage by stage; stages share it, as none undoes what another does."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.cwd = image
        self.environment = dict(os.environ, HOME=str(image), TORCH_INDEX=os.environ.get("TORCH_INDEX", ""))

    def run(self, target: str) -> int:
        for stage in lineage(target):
            self.walk(stage)
        if target == "cuda":
            subprocess.run(["python", "-c", TRITON_TOOLS], env=self.environment, check=True)
        return self.serve(json.loads(next(inherited(target, "CMD"))), next(inherited(target, "HEALTHCHECK")))

    def inside(self, text: str) -> str:
        for path in FOLDERS:
            text = text.replace(path, f"{self.image}{path}")
        return text

    def walk(self, stage: Stage) -> None:
        for step in stage.steps:
            value = step.value
            if step.kind == "WORKDIR":
                self.cwd = Path(self.inside(value))
                self.cwd.mkdir(parents=True, exist_ok=True)
            elif step.kind == "ARG":
                name, _, default = value.partition("=")
                self.environment.setdefault(name, default)
            elif step.kind == "ENV":
                pairs = value.replace("$PATH", self.environment["PATH"]).split()
                self.environment.update(self.inside(pair).split("=", 1) for pair in pairs)
            elif step.kind == "COPY":
                self.copy(step.sources, value.split()[-1])
            elif step.kind == "RUN" and "apt-get" not in value:
                print(f"[{stage.name}] {value}", flush=True)
                command = ["bash", "-o", "pipefail", "-c", self.inside(value)]
                subprocess.run(command, cwd=self.cwd, env=self.environment, check=True)

    def copy(self, sources: list[str], target: str) -> None:
        for source in sources:
            place = self.cwd / target / (Path(source).name if target == "./" else "")
            place.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", str(ROOT / source), str(place)], check=True)

    def serve(self, command: list[str], health: str) -> int:
        """Start the image's command on a free port, ask for a text, for the page, and for its health in its own way."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        cwd = self.image / "opt" / "dibit"
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd,
            env=self.environment,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    body = {"prompt": "One and one is", "max_tokens": 8}
                    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                except httpx.TransportError:
                    time.sleep(2)
                    continue
                if answer.status_code == 200:
                    print(answer.json()["choices"][0])
                    page = httpx.get(f"{url}/", timeout=60)
                    asked = json.loads(health[health.index("CMD") + 3 :].replace("http://127.0.0.1:8000", url))
                    healthy = subprocess.run(asked, env=self.environment, check=False).returncode == 0
                    print(f"GET / {page.status_code}, healthy: {healthy}")
                    return 0 if healthy and page.status_code == 200 else 1
                time.sleep(2)
            print("no answer", file=sys.stderr)
            return 1
        finally:
            server.send_signal(15)  # as Docker does
            print("ended with", server.wait(timeout=90))


if __name__ == "__main__":
    sys.exit(main())
