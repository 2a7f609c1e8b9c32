"""The ``dibit`` command, as its users run it."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.serve_process import ServeProcess
from deployments.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "ernie-tiny" / "bf16"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Dibit = Callable[..., Done]


@pytest.fixture
def dibit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dibit:
    """Runs the command in this process, which saves importing torch and Ray each time."""

    def run(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        return Done(ended.value.code or 0, shown.out, shown.err)

    return run


def fails(done: Done, *mentioned: str) -> None:
    """One clear line, no traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ")
    for text in mentioned:
        assert text in line


@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_help_has_examples(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Examples" in shown.output
    assert f"dibit {command}" in shown.output


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "quantize", "inspect", "env", "plan", "keys"])
def test_help_names_every_option_in_full(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert "…" not in shown.output  # what rich puts where a column is too narrow


def test_help_needs_no_heavy_import() -> None:
    code = "import sys, deployments.cli; print([m for m in ('torch', 'ray', 'httpx', 'pydantic') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def write(folder: Path, **args: Any) -> Path:
    path = folder / "config.yaml"
    application = {"name": "a", "import_path": "deployments.app:build", "args": args}
    path.write_text(yaml.safe_dump({"http_options": {"port": 1234}, "applications": [application]}))
    return path


def test_options_override_the_configuration(tmp_path: Path) -> None:
    from deployments.commands.serve import ServeOverrides, read_plan

    path = write(tmp_path, model="x", served_model_name="y", engine={"block_size": 8}, pools=[{"name": "p"}])
    plain = read_plan(path, ServeOverrides())
    assert (plain.host, plain.port, plain.name) == ("127.0.0.1", 1234, "a")
    assert plain.args == {"model": "x", "served_model_name": "y", "engine": {"block_size": 8}, "pools": [{"name": "p"}]}
    plan = read_plan(
        path, ServeOverrides(model="m", port=0, host="::1", tensor_parallel_size=2, replicas=3, max_model_len=64)
    )
    assert (plan.host, plan.port) == ("::1", 0)
    assert plan.args == {
        "model": "m",
        "engine": {"block_size": 8, "max_model_len": 64},
        "pools": [{"name": "p", "tensor_parallel_size": 2, "replicas": 3}],
    }


def test_serve_tells_what_is_wrong_before_it_starts(dibit: Dibit, tmp_path: Path) -> None:
    fails(dibit("serve", "nowhere.yaml"), "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    fails(dibit("serve", str(broken)), "YAML")
    fails(dibit("serve", str(write(tmp_path, model="no/such/model"))), "no/such/model")
    fails(dibit("serve", str(write(tmp_path, model=str(MODEL), engine={"block_sise": 8}))), "block_sise")
    good = str(write(tmp_path, model=str(MODEL)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        fails(dibit("serve", good, "--port", port), port, "--port")
    assert dibit("serve", good, "--port", "many").returncode == 2


def test_generate_continues_prompts(dibit: Dibit) -> None:
    options = ["--model", str(MODEL), "--max-tokens", "8", "--seed", "3"]
    done = dibit("generate", *options, "--json", "-p", "Once upon", "-p", "The sun")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["Once upon", "The sun"]
    assert all(record["completion_tokens"] <= 8 for record in records)
    piped = dibit("generate", *options, stdin="Once upon")
    assert piped.stdout == f"Once upon{records[0]['text']}\n"


def test_generate_tells_what_is_wrong(dibit: Dibit, tmp_path: Path) -> None:
    fails(dibit("generate", "--model", str(tmp_path), "-p", "x"), "config.json")
    fails(dibit("generate", "--model", str(MODEL), "-p", "x", "--top-p", "3"), "top_p")
    fails(dibit("generate", "--model", str(MODEL), "-p", ""), "prompt")


def test_chat_without_a_server(dibit: Dibit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unanswered:
        port = unanswered.getsockname()[1]
    fails(dibit("chat", "Hello", "--url", f"http://127.0.0.1:{port}"), str(port), "dibit serve")


def test_serve_chat_and_ctrl_c(dibit: Dibit, tmp_path: Path) -> None:
    args = {"model": str(MODEL), "engine": {"max_model_len": 256, "num_threads": 1}}
    with ServeProcess(args, tmp_path, program=[sys.executable, "-m", "deployments.cli", "serve"]) as server:
        deadline = time.monotonic() + 30
        while "Ctrl-C" not in (shown := server.tail()):
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        assert f"{server.url}/v1" in shown
        assert "curl" in shown
        options = ["--url", server.url, "--seed", "1", "--max-tokens", "20"]
        once = dibit("chat", "Tell me a story.", *options)
        assert once.returncode == 0, once.stderr
        assert once.stdout.strip()
        again = dibit("chat", "Tell me a story.", *options)
        assert again.stdout == once.stdout
        talk = dibit("chat", *options, stdin="Tell me a story.\nAnd then?\n/new\nTell me a story.\n/quit\n")
        assert talk.returncode == 0, talk.stderr
        assert talk.stdout.count(once.stdout.strip()) == 2
        fails(dibit("chat", "Hi", *options, "--model", "other"), "other")
        assert server.stop() == 0, server.tail()
    log = server.tail()
    assert "Stopped." in log
    assert "Traceback" not in log
    deadline = time.monotonic() + 20
    while remaining := server.processes():
        assert time.monotonic() < deadline, remaining
        time.sleep(0.1)
