"""The bundled Redis: how it is started, and that its password goes nowhere else."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendering import helm, render

STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(json.dumps([os.getpid(), sys.argv[1:], sys.stdin.read()]), flush=True)
signal.pause()
"""
"""In place of redis-server: says what it got, then waits for the end."""

SHELLS = [shell for shell in (["dash"], ["busybox", "sh"], ["bash"]) if shutil.which(shell[0])]


def stateful_set() -> dict[str, Any]:
    return dict(render()[("StatefulSet", "test-dibit-redis")]["spec"])


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0])
@pytest.mark.parametrize("password", ["simple", 'a"b', "back\\slash\\", "$HOME `id` $(id)", "quote'%s#;&|*?<>{}[]~!"])
def test_redis_is_the_process_and_reads_its_password(shell: list[str], password: str, tmp_path: Path) -> None:
    (container,) = stateful_set()["template"]["spec"]["containers"]
    interpreter, *arguments = container["command"]
    assert interpreter == "sh"
    server = tmp_path / "redis-server"
    server.write_text(STAND_IN, encoding="utf-8")
    server.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": password}
    command = [*shell, *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        pid, argv, given = json.loads(started.stdout.readline())
        os.kill(pid, signal.SIGTERM)
    assert pid == started.pid  # so it gets the signal that the first process of a container gets
    assert (argv, started.returncode) == (["-"], 0)
    # Redis reads "..." with \\ before a backslash or a quote, as shlex does (sdssplitargs in its sds.c).
    assert [shlex.split(line) for line in given.splitlines()] == [
        ["requirepass", password],
        ["appendonly", "yes"],
        ["dir", "/data"],
    ]


def test_the_password_stands_in_the_secret_only() -> None:
    text = helm("template", "test", str(Path(__file__).parents[2] / "helm" / "dibit"), "--namespace", "ml")
    (secret,) = [found for found in yaml.safe_load_all(text) if found and found["kind"] == "Secret"]
    assert len(secret["data"]["password"]) > 40
    assert text.count(secret["data"]["password"]) == 1


def test_a_password_of_ones_own_is_not_made_again() -> None:
    """Where charts are rendered without a cluster, a random one would be another each time."""
    values = {"ray": {"gcsFaultTolerance": {"passwordSecret": "mine", "passwordKey": "redis"}}}
    objects = render(values)
    assert objects == render(values)
    assert not [name for kind, name in objects if kind == "Secret"]
    (container,) = objects[("StatefulSet", "test-dibit-redis")]["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": "redis"}


def test_the_state_goes_with_the_release() -> None:
    assert stateful_set()["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Delete", "whenScaled": "Retain"}
