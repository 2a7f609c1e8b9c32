"""``dibit chat`` at a door that asks for a key."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvicorn

from deployments.access.config import AccessConfig
from deployments.access.store import KeyFile, KeyOptions
from deployments.cli import main
from deployments.openai.app import create_app
from engine.tokenizer import Tokenizer
from tests.fuzz.synthetic import SyntheticEngine

MODEL = Path(__file__).resolve().parents[3] / "examples" / "ernie-tiny" / "bf16"


@pytest.fixture
def door(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a server, and a key that it takes."""
    keys = KeyFile(tmp_path / "keys.jsonl")
    key = keys.add(KeyOptions(name="somebody"), now=datetime.now(UTC))[0]
    tokenizer = Tokenizer.from_folder(MODEL)
    app = create_app(
        SyntheticEngine(vocab_size=tokenizer.used_vocab_size),
        tokenizer=tokenizer,
        access=AccessConfig(keys_file=str(keys.path)),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", key
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def chat(url: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["chat", "Hi", "--url", url, "--max-tokens", "4"])
    return ended.value.code


def test_the_key_comes_from_the_environment(
    door: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, key = door
    monkeypatch.setenv("DIBIT_API_KEY", key)
    assert chat(url) in (None, 0)
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert key not in shown.out + shown.err


@pytest.mark.parametrize("key", [None, "sk-dibit-of-somebody-else"])
def test_without_a_key_it_says_where_one_is_looked_for(
    door: tuple[str, str], key: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIBIT_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("DIBIT_API_KEY", key)
    assert chat(door[0]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("Error: ")
    assert "DIBIT_API_KEY" in line
    assert "Traceback" not in line
