"""Models by name: from a hub that is a small server here, and what is said when there is none."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from engine.checkpoint.hub import resolve_model
from engine.errors import CheckpointError
from engine.llm import LLM

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": []}',
    "tokenizer.model": b"pieces",
    "rank0/model.safetensors": b"weights of rank 0",
    "rank1/model.safetensors": b"weights of rank 1",
    "mtp/config.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "rank0/model_state.pdparams": b"a pickle",
    "code.py": b"print('run me')",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as fetching a repository takes."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        if path.startswith("/api/models/org/gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models/org/model/revision/absent":
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path in ("/api/models/org/model", "/api/models/org/model/revision/main"):
            self._send(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            self._send(200, json.dumps(files).encode())
        elif (name := path.removeprefix(f"/org/model/resolve/{COMMIT}/")) in FILES:
            content = FILES[name]
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def fetch(tmp_path: Path, asked: list[str]) -> Iterator[Callable[..., Path]]:
    """``resolve_model`` with a hub of its own and a cache of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    disable_progress_bars()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield lambda *args, **options: resolve_model(*args, cache_dir=tmp_path / "cache", endpoint=endpoint, **options)
    enable_progress_bars()
    server.shutdown()
    server.server_close()


def found(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_repository_comes_with_rank_folders_and_without_pickles_or_code(fetch: Callable[..., Path]) -> None:
    folder = fetch("org/model")
    assert found(folder) == set(FILES) - {"pytorch_model.bin", "rank0/model_state.pdparams", "code.py"}
    assert (folder / "rank1/model.safetensors").read_bytes() == FILES["rank1/model.safetensors"]


def test_weights_can_be_left_out_and_fetched_later(fetch: Callable[..., Path], asked: list[str]) -> None:
    folder = fetch("org/model", weights=False)
    assert found(folder) == {"config.json", "tokenizer.model", "mtp/config.json"}
    del asked[:]
    assert fetch("org/model", "main") == folder
    assert "rank0/model.safetensors" in found(folder)
    assert not any(path.endswith("config.json") for path in asked), "what is there is not fetched again"


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("org/absent", None, "does not exist at the hub, or is private"),
        ("org/gated", None, "asks its users to agree to its terms.*HF_TOKEN"),
        ("org/model", "absent", "has no revision 'absent'"),
    ],
)
def test_what_the_hub_refuses_is_said(
    fetch: Callable[..., Path], model: str, revision: str | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"there is no folder '{model}', and the repository.*{message}"):
        fetch(model, revision)


@pytest.mark.parametrize("model", ["absent", "/no/such/folder", "./a/b", "org/../model", "a/b/c"])
def test_what_is_no_folder_and_no_name_is_not_looked_for_anywhere(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder .*give the path.* like baidu/"):
        resolve_model(model)


def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        with pytest.raises(CheckpointError, match=r"there is no folder 'org/model'.*hub can't be reached.*hf download"):
            resolve_model("org/model", cache_dir=tmp_path, endpoint=f"http://127.0.0.1:{free.getsockname()[1]}")


def test_offline_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from engine.llm import LLM; LLM('org/model')"],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert "CheckpointError: there is no folder 'org/model'" in last
    assert "HF_HUB_OFFLINE" in last


def test_a_name_that_is_no_model_fails_at_the_entry() -> None:
    with pytest.raises(CheckpointError, match="there is no folder 'absent'"):
        LLM("absent")
