"""An engine in the server's own process: the endpoints without Ray, for tests and for measuring what Ray adds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deployments.mailbox import Inbox
from engine.config import EngineConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import EngineDeadError
from engine.execution.executor import Executor, StepExecutor
from engine.loop import EngineLoop
from engine.messages import EngineLoad, EngineRequest, StepOutput, TokenDelta
from engine.structured.compiler import GrammarCompiler
from engine.tokenizer import Tokenizer

STALLED_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class LocalModel:
    """What a local engine serves; see :class:`deployments.openai.generation.ServedModel`."""

    served_model_name: str
    max_model_len: int
    created: int


class LocalEngine:
    """An :class:`EngineLoop` behind the interface of ``deployments.client.EngineClient``.

    Lives on the event loop that calls :meth:`start`; the engine itself runs in a thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        *,
        served_model_name: str | None = None,
        executor: StepExecutor | None = None,
    ) -> None:
        """Load the model, unless there is an ``executor`` that has one.

        Raises:
            DibitError: the model or an option is wrong.
        """
        model = ModelConfig.from_folder(config.model)
        executor = executor or Executor.start_local(config, model)
        core = EngineCore(
            config,
            model,
            executor,
            used_vocab_size=min(tokenizer.used_vocab_size, model.vocab_size),
            eos_token_ids={*tokenizer.eos_token_ids, *model.eos_token_ids},
            grammars=GrammarCompiler.of(tokenizer, vocab_size=model.vocab_size),
        )
        self.info = LocalModel(
            served_model_name=served_model_name or Path(config.model).name,
            max_model_len=executor.max_model_len,
            created=int(time.time()),
        )
        self.load: EngineLoad = core.load()
        self._engine = EngineLoop(core, on_step=self._on_step, on_error=self._on_error)
        self._inboxes: dict[str, Inbox] = {}
        self._unsent: list[EngineRequest] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to step; called on the event loop that will call :meth:`generate`."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        """Run one request; closing the generator aborts it.

        Raises:
            RequestError: the engine can't serve the request.
            EngineDeadError: the engine stopped.
        """
        if not self._engine.is_alive:
            raise EngineDeadError("the engine has stopped")
        inbox = self._inboxes[request.request_id] = Inbox()
        self._submit(request)
        finished = False
        try:
            while not finished:
                delta = await inbox.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            del self._inboxes[request.request_id]
            if not finished:
                self._engine.abort([request.request_id])

    def healthy(self) -> bool:
        """Whether a step or a heartbeat was seen lately."""
        return self._engine.is_alive and time.monotonic() - self._engine.last_progress < STALLED_AFTER_S

    async def close(self) -> None:
        """Stop the engine; what is under way ends with an error."""
        await asyncio.to_thread(self._engine.stop)
        self._fail(EngineDeadError("the server is shutting down"))

    def _submit(self, request: EngineRequest) -> None:
        """Queue a request with all others of this event-loop turn, so that they can share their first step."""
        if not self._unsent and self._loop is not None:
            self._loop.call_soon(self._flush)
        self._unsent.append(request)

    def _flush(self) -> None:
        requests, self._unsent = self._unsent, []
        with suppress(EngineDeadError):  # whoever waits has been told by _fail
            self._engine.submit([request for request in requests if request.request_id in self._inboxes])

    def _on_step(self, output: StepOutput) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._deliver, output)

    def _on_error(self, error: EngineDeadError) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _deliver(self, output: StepOutput) -> None:
        self.load = output.load
        for delta in output.deltas:
            if (inbox := self._inboxes.get(delta.request_id)) is not None:
                inbox.put(delta)
        for request_id, refusal in output.refused.items():
            if (inbox := self._inboxes.get(request_id)) is not None:
                inbox.fail(refusal)

    def _fail(self, error: EngineDeadError) -> None:
        for inbox in self._inboxes.values():
            inbox.fail(error)
