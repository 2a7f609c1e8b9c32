"""The pod of `helm test`: its program, run as it stands in the chart against a real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rendering import render


class Handler(BaseHTTPRequestHandler):
    """Wants the key "right", and answers like the API."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers.get("Authorization") == "Bearer right" and self.path == "/v1/completions"
        body = b'{"choices": [{"text": " two"}]}' if known else b'{"error": {"message": "no such key"}}'
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def run(url: str, values: dict[str, Any], **secrets: str) -> tuple[int, str]:
    """Exit status and words of the test with these values, and with variables from Secrets."""
    asked = {**values, "test": {"url": url, **values.get("test", {})}}
    (container,) = render(asked)[("Pod", "test-dibit-test")]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    from_secrets = {variable["name"] for variable in container["env"] if "valueFrom" in variable}
    assert set(secrets) == from_secrets
    done = subprocess.run(
        [sys.executable, *container["command"][1:]],
        env={"PATH": os.environ["PATH"], **environment, **secrets},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


KEYS = {"apiKeys": {"secret": "keys"}, "test": {"apiKeySecret": "mine"}}


def test_one_completion_is_enough() -> None:
    with server() as url:
        assert run(url, KEYS, API_KEY="right") == (0, '200 {"choices": [{"text": " two"}]}\n')


def test_a_wrong_key_fails_with_the_answer() -> None:
    with server() as url:
        status, words = run(url, KEYS, API_KEY="wrong")
    assert (status, words) == (1, '401 {"error": {"message": "no such key"}}\n')


def test_a_missing_key_is_named() -> None:
    with server() as url:
        status, words = run(url, {"apiKeys": {"secret": "keys"}})
    assert status == 1
    assert "test.apiKeySecret" in words
    assert "401" not in words  # it did not even ask
    assert "Traceback" not in words


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    status, words = run(f"http://127.0.0.1:{port}", {})
    assert status == 1
    assert "gives no answer" in words
    assert "Traceback" not in words


def test_a_policy_for_clients_lets_it_in() -> None:
    objects = render({"networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"role": "client"}}}]}})
    labels = objects[("Pod", "test-dibit-test")]["metadata"]["labels"]
    peers = objects[("NetworkPolicy", "test-dibit")]["spec"]["ingress"][0]["from"]
    assert any(peer["podSelector"]["matchLabels"].items() <= labels.items() for peer in peers)
