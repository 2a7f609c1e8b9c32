"""Requests whose grammars are being compiled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.scheduling.request import Request
from engine.structured.compiler import GrammarCompiler

if TYPE_CHECKING:  # XGrammar takes seconds to import
    import xgrammar


class Pending:
    """What the engine's thread gives to the threads that compile, and takes back.

    Args:
        compiler: compiles.
        on_ready: called from any thread when there is something to :meth:`take`.
    """

    def __init__(self, compiler: GrammarCompiler, on_ready: Callable[[], None]) -> None:
        self._compiler = compiler
        self._on_ready = on_ready
        self._requests: dict[str, tuple[Request, Future[xgrammar.CompiledGrammar]]] = {}
        self._done: deque[str] = deque()  # ids, appended by the threads that compile

    def add(self, request: Request) -> None:
        """Have a request's ``structured_outputs`` compiled."""
        spec = request.params.structured_outputs
        if spec is None:
            raise ValueError(f"request {request.request_id!r} has no structured_outputs")
        grammar = self._compiler.compile(spec)
        self._requests[request.request_id] = request, grammar
        grammar.add_done_callback(lambda _: self._announce(request.request_id))

    def abort(self, request_id: str) -> None:
        """Forget a request, if it is here."""
        known = self._requests.pop(request_id, None)
        if known is not None:
            known[1].cancel()

    @property
    def is_ready(self) -> bool:
        """Whether there may be something to take."""
        return bool(self._done)

    def take(self) -> Iterator[tuple[Request, RequestError | None]]:
        """The requests that have their grammar since the last call, or can't have one, and why."""
        while self._done:
            known = self._requests.get(self._done.popleft())
            if known is None or not known[1].done():
                continue  # aborted since; perhaps another one has its id by now
            request, grammar = known
            del self._requests[request.request_id]
            yield request, self._begin(request, grammar)

    def wait(self) -> None:
        """Block until there is something to take, if that is to be expected."""
        if self._requests and not self._done:
            wait([grammar for _, grammar in self._requests.values()], return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """Compile no more; may be called again."""
        self._compiler.close()

    def _announce(self, request_id: str) -> None:
        self._done.append(request_id)
        self._on_ready()

    def _begin(self, request: Request, grammar: Future[xgrammar.CompiledGrammar]) -> RequestError | None:
        try:
            request.grammar = self._compiler.matcher(grammar.result(), request.output_token_ids)
        except RequestError as error:
            return error
        except Exception as error:  # XGrammar's own: the requests of others need not suffer
            return RequestError(f"structured_outputs can't be used: {error}", field="structured_outputs")
        if request.grammar.ended:
            return RequestError("the given output tokens are complete", field="output_token_ids")
        return None


def dead_end() -> RequestError:
    """For a request whose grammar allows no token at all."""
    return RequestError(
        "structured_outputs: the text so far can't go on: the grammar has no sentence that begins so, or none that "
        "this model's tokens can write",
        field="structured_outputs",
    )
