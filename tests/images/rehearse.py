"""Runs the Dockerfile's own commands for the CPU image without a container engine, then asks the result for a text.

    python tests/images/rehearse.py

Folders of the image become folders of a temporary one; what needs root (apt, useradd) is left out. Takes minutes: it
installs everything anew, from the network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("build", "runtime", "cpu")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="dibit-image-") as folder:
        return rehearse(Path(folder))


def rehearse(image: Path) -> int:
    def inside(text: str) -> str:
        for path in ("/opt/venv", "/opt/dibit", "/src"):
            text = text.replace(path, f"{image}{path}")
        return text

    stage, cwd = "", image
    environment = dict(os.environ, HOME=str(image), BASE="", TORCH_INDEX="")
    for step in DockerfileParser(path=str(ROOT)).structure:
        kind, value = step["instruction"], step["value"]
        if kind == "FROM":
            stage = value.partition(" AS ")[2]
        if stage not in STAGES:
            continue
        if kind == "WORKDIR":
            cwd = Path(inside(value))
            cwd.mkdir(parents=True, exist_ok=True)
        elif kind == "ARG":
            name, _, default = value.partition("=")
            environment.setdefault(name, default)
        elif kind == "ENV":
            environment.update(
                inside(pair).split("=", 1) for pair in value.replace("$PATH", environment["PATH"]).split()
            )
        elif kind == "COPY" and not value.startswith("--from"):
            *sources, target = value.split()
            for source in sources:
                place = cwd / target / (Path(source).name if target == "./" else "")
                place.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-r", str(ROOT / source), str(place)], check=True)
        elif kind == "RUN" and "apt-get" not in value:
            print(f"[{stage}] {value}", flush=True)
            subprocess.run(["bash", "-o", "pipefail", "-c", inside(value)], cwd=cwd, env=environment, check=True)
    return serve(cwd, environment)


def serve(cwd: Path, environment: dict[str, str]) -> int:
    config = yaml.safe_load((cwd / "serve_config.yaml").read_text(encoding="utf-8"))
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    server = subprocess.Popen(["serve", "run", "serve_config.yaml"], cwd=cwd, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and server.poll() is None:
            try:
                answer = httpx.post(
                    f"{url}/v1/completions", json={"prompt": "One and one is", "max_tokens": 8}, timeout=60
                )
            except httpx.TransportError:
                time.sleep(2)
                continue
            if answer.status_code == 200:
                print(answer.json()["choices"][0])
                return 0
            time.sleep(2)
        print("no answer", file=sys.stderr)
        return 1
    finally:
        server.send_signal(2)
        server.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
