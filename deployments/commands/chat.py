"""``dibit chat``: a conversation with a running server, streamed to the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.prompt import Prompt

from engine.errors import DibitError

API_KEY = "DIBIT_API_KEY"
"""The environment variable with the key to send: a command line would show it to every user of the machine."""

HELP = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer."


class ChatError(DibitError):
    """The server can't be reached or refused."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Options of ``dibit chat``; ``None`` leaves the choice to the server."""

    url: str
    model: str | None
    system: str | None
    temperature: float | None
    max_tokens: int | None
    seed: int | None


class Conversation:
    """The messages so far, and the server that continues them."""

    def __init__(self, http: httpx.Client, options: ChatOptions) -> None:
        self._http = http
        self._options = options
        self.model = options.model or self._served_model()
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        system = self._options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str) -> Iterator[str]:
        """Add a user's turn and yield the answer as it comes; what came is remembered even if the rest isn't read.

        Raises:
            ChatError: the server refused or went away; the turn is then taken back.
        """
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                yield piece
        except ChatError:
            self.messages.pop()
            raise
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _stream(self) -> Iterator[str]:
        options = self._options
        wanted = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed}
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, "stream": True}
        body |= {name: value for name, value in wanted.items() if value is not None}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatError(_message(response))
                yield from _texts(response.iter_lines())
        except httpx.HTTPError as error:
            raise ChatError(f"the connection to {options.url} failed: {error or type(error).__name__}") from None

    def _served_model(self) -> str:
        try:
            response = self._http.get("/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(
                f"no server answers at {self._options.url} ({error}); start one with 'dibit serve', or name another "
                "with --url"
            ) from None
        if response.status_code == 401:
            raise ChatError(f"{_message(response)}; dibit chat sends the one in the environment variable {API_KEY}")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ChatError(
                f"{self._options.url}/v1/models answered {response.status_code} without a model; is it a Dibit server?"
            ) from None


def run_chat(question: str | None, options: ChatOptions) -> None:
    """Ask one question, or hold a conversation until its user leaves.

    Raises:
        ChatError: the server can't be reached, or refused the one question.
    """
    console = Console(highlight=False)
    key = os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=options.url, headers=headers, timeout=httpx.Timeout(10.0, read=None)) as http:
        conversation = Conversation(http, options)
        if question is not None:
            _show(console, conversation.ask(question))
            return
        console.print(f"[bold]{conversation.model}[/bold] at {options.url}. {HELP}", style="dim")
        while True:
            try:
                question = Prompt.ask("[bold cyan]you[/bold cyan]", console=console).strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if question in ("/quit", "/exit"):
                return
            if question == "/new":
                conversation.reset()
                console.print("A new conversation.", style="dim")
            elif question:
                _turn(console, conversation, question)


def _turn(console: Console, conversation: Conversation, question: str) -> None:
    answer = conversation.ask(question)
    try:
        _show(console, answer)
    except KeyboardInterrupt:
        console.print(" …", style="dim")
    except ChatError as error:
        console.print(f"Error: {error}", style="red", markup=False)
    finally:
        answer.close()  # type: ignore[attr-defined]  # a generator: closing it hangs up on the server


def _show(console: Console, pieces: Iterator[str]) -> None:
    for piece in pieces:
        console.print(piece, end="", markup=False, soft_wrap=True)
        console.file.flush()
    console.print()


def _texts(lines: Iterator[str]) -> Iterator[str]:
    """The texts of a stream of server-sent events."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ChatError(event["error"]["message"])
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answered {response.status_code}: {response.text[:200]}"
