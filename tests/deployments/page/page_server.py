"""The page on a real server: a cluster that a test makes up, and a model that says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.directory import EngineAddress
from deployments.observability.config import ObservabilityConfig
from deployments.observability.experts import ExpertLoads
from deployments.observability.metrics import Metrics
from deployments.observability.routes import observability_routes
from deployments.routing import Replica
from engine.messages import EngineLoad


def address(pool: str, replica_id: str, **spec: Any) -> EngineAddress:
    limits = {"max_model_len": 4096, "block_size": 16, "total_blocks": 1024, "max_num_seqs": 64}
    limits["max_num_batched_tokens"] = 2048
    return EngineAddress(
        spec=Replica(replica_id=replica_id, pool=pool, **(limits | spec)),
        model_path="/models/tiny",
        identity="0",
        actor_name=f"{replica_id}-0",
        namespace="serve",
        stalled_after_s=60.0,
        start_seconds=1.0,
    )


def load(**values: Any) -> EngineLoad:
    idle = {
        "waiting_requests": 0, "running_requests": 0, "waiting_prefill_tokens": 0, "free_blocks": 1024,
        "total_blocks": 1024, "steps": 1, "step_seconds": 0.01,
    }  # fmt: skip
    return EngineLoad(**(idle | values))


@dataclass
class Engine:
    """What :class:`deployments.observability.state.EngineView` asks for."""

    address: EngineAddress
    load: EngineLoad | None = None
    rates: None = None
    ready: bool = True
    retired: bool = False
    silent_s: float = 0.1


@dataclass
class Model:
    served_model_name: str = "tiny"
    max_model_len: int = 4096


@dataclass
class Cluster:
    """A :class:`deployments.observability.state.StateSource`."""

    members: list[Engine] = field(default_factory=list)
    info: Model = field(default_factory=Model)
    held: int = 0

    def engines(self) -> list[Engine]:
        return list(self.members)


class Script:
    """What the model answers: pieces, before each of which it waits until it may go on."""

    def __init__(self) -> None:
        self.pieces: list[str] = ["Hello", " there"]
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.left = threading.Event()

    async def answer(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "Incorrect API key <b>provided</b>"}}, status_code=401)
        self.requests.append(await request.json())
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[str]:
        try:
            for i, piece in enumerate(self.pieces):
                if i:
                    await asyncio.to_thread(self.may_go_on.wait, 20)
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield _event({"choices": [], "usage": {"completion_tokens": len(self.pieces)}})
            yield "data: [DONE]\n\n"
        finally:
            self.left.set()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


class PageServer:
    """uvicorn in a thread of its own, under a path of its own, as behind a Serve ``route_prefix``."""

    def __init__(self, config: ObservabilityConfig | None = None) -> None:
        self.cluster = Cluster()
        self.script = Script()
        self.metrics = Metrics()
        self.experts = ExpertLoads()
        routes = observability_routes(
            self.cluster, self.metrics, config or ObservabilityConfig(), pools=("a100",), experts=self.experts
        )
        chat = Route("/v1/chat/completions", self.script.answer, methods=["POST"])
        app = Starlette(routes=[*routes, chat])
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def close(self) -> None:
        self.script.may_go_on.set()
        self._uvicorn.should_exit = True
        self._uvicorn.force_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive(), "the server did not end"
