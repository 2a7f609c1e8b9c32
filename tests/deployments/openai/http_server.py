"""A server for HTTP tests: real uvicorn on a free port, a real small model in the same process, no Ray."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from deployments.local import LocalEngine
from deployments.openai.app import create_app
from engine.config import EngineConfig, ModelConfig
from engine.execution.executor import Executor
from engine.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[3] / "examples" / "ernie-tiny" / "bf16"
NAME = "tiny"
MAX_MODEL_LEN = 256
MAX_BODY_BYTES = 1 << 20


class Breakable:
    """An executor whose next step fails once ``broken`` is set: what the core sees of a rank that dies."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.broken = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def execute(self, step: Any) -> torch.Tensor:
        if self.broken.is_set():
            raise RuntimeError("rank 1 is gone")
        return self._executor.execute(step)


class Server:
    """uvicorn and an engine in a thread of their own."""

    def __init__(self, **options: Any) -> None:
        engine: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16, "num_kv_blocks": 256}
        self.config = EngineConfig(model=str(MODEL), device="cpu", num_threads=1, **(engine | options))
        self.tokenizer = Tokenizer.from_folder(MODEL)
        self.executor = Breakable(Executor.start_local(self.config, ModelConfig.from_folder(MODEL)))
        self.engine = LocalEngine(self.config, self.tokenizer, served_model_name=NAME, executor=self.executor)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = create_app(
            self.engine, tokenizer=self.tokenizer, max_body_bytes=MAX_BODY_BYTES, on_shutdown=self.engine.close
        )
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._thread.start()

    async def _serve(self) -> None:
        self.engine.start()
        await self._uvicorn.serve(sockets=[self._socket])

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive(), "the server did not end"

    @property
    def free_blocks(self) -> int:
        return self.engine.load.free_blocks

    def wait_until_idle(self, seconds: float = 5.0) -> None:
        """All blocks free and nothing under way, within ``seconds``."""
        deadline = time.monotonic() + seconds
        while (load := self.engine.load).free_blocks < load.total_blocks or load.running_requests:
            assert time.monotonic() < deadline, f"after {seconds} s still {load}"
            time.sleep(0.02)  # nothing signals a load; it changes with steps and heartbeats


def events(response: httpx.Response) -> list[Any]:
    """The decoded server-sent events of a whole response; ``[DONE]`` as that string."""
    found = []
    for line in response.text.split("\n\n"):
        if line:
            assert line.startswith("data: "), line
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found
