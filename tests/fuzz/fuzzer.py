"""Sends what was generated into the app, and judges every answer."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from requests import Request as HttpRequest
from schemathesis import GenerationMode
from starlette.applications import Starlette

from deployments.access.config import AccessConfig
from deployments.openai.app import create_app
from deployments.openai.schema import describe
from engine.config import EngineConfig
from engine.tokenizer import Tokenizer
from tests.fuzz.asgi import Answer, call
from tests.fuzz.mutants import mutants
from tests.fuzz.requests import Request, requests
from tests.fuzz.synthetic import MODEL, SyntheticEngine

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "ernie-tiny" / "bf16"
SECONDS = 60.0
"""Longest that any one request may take, on a busy machine and with everything still to be imported."""
BATCH = 1000
MUTANTS = 4
"""Of each request that hypothesis makes."""


class Fuzzer:
    """An app, an event loop to run it on, and a count of its answers by status."""

    def __init__(self, app: Starlette, runner: asyncio.Runner) -> None:
        self.app = app
        self._runner = runner
        self.statuses: Counter[int] = Counter()

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    def send(self, request: Request) -> Answer:
        """Send a request.

        Raises:
            AssertionError: the answer is a 5xx, not as HTTP or OpenAI's clients need it, or does not come.
        """
        answer = self._runner.run(self._send(request))
        self.statuses[answer.status] += 1
        judge(request, answer)
        return answer

    async def _send(self, request: Request) -> Answer:
        async with asyncio.timeout(SECONDS):
            return await call(
                self.app,
                request.method,
                request.path,
                headers=request.headers,
                body=request.body,
                pieces=request.pieces,
                query=request.query,
            )

    def hypothesis(self, count: int, *, start: int, progress: Callable[[], None] = lambda: None) -> None:
        """Send at least ``count`` requests of :func:`requests`, most of them :func:`mutants` of others."""
        self._until(count, requests(), mutated=MUTANTS, start=start, progress=progress)

    def schemathesis(self, count: int, *, start: int, progress: Callable[[], None] = lambda: None) -> None:
        """Send at least ``count`` requests made from the API's description, both to its letter and against it."""
        schema = schemathesis.openapi.from_dict(describe(MODEL.served_model_name))
        strategies = [
            operation.as_strategy(generation_mode=mode).map(_from_case)
            for result in schema.get_all_operations()
            for operation in [result.ok()]
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            if operation.body or mode is GenerationMode.POSITIVE  # without a body nothing can be wrong
        ]
        self._until(count, st.one_of(strategies), mutated=0, start=start, progress=progress)

    def _until(
        self,
        count: int,
        strategy: st.SearchStrategy[Request],
        *,
        mutated: int,
        start: int,
        progress: Callable[[], None],
    ) -> None:
        goal = self.sent + count
        while self.sent < goal:
            before = self.sent
            examples = -(-min(goal - self.sent, BATCH) // (mutated + 1))
            self._generate(strategy, mutated=mutated, examples=examples, number=start)
            start += 1
            assert self.sent > before, "nothing new can be generated"
            progress()

    def _generate(self, strategy: st.SearchStrategy[Request], *, mutated: int, examples: int, number: int) -> None:
        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
        )
        @given(request=strategy, dice=st.integers(0, 2**32))
        def run(request: Request, dice: int) -> None:
            self.send(request)
            for mutant in mutants(request, seed=dice, count=mutated):
                self.send(mutant)

        run()


def judge(request: Request, answer: Answer) -> None:
    """Check that an answer is one that a client can read, and no 5xx.

    Raises:
        AssertionError: it isn't.
    """
    assert 200 <= answer.status < 500, answer
    kind = (answer.header("content-type") or "").partition(";")[0]
    declared = answer.header("content-length")
    assert declared is None or int(declared) == len(answer.body) or request.method == "HEAD", answer
    assert answer.header("x-request-id"), answer
    if answer.status >= 400:
        if request.method == "HEAD":
            return
        assert kind == "application/json", answer
        error = json.loads(answer.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, answer
        assert isinstance(error["message"], str), answer
        assert error["message"], answer
        assert len(answer.body) < 10_000, "an error as long as its request"
    elif kind == "application/json":
        json.loads(answer.body, parse_constant=_no_constant)
    elif kind == "text/event-stream":
        events = answer.body.decode("utf-8").split("\n\n")
        assert events.pop() == "", "an unfinished event"
        assert events.pop() == "data: [DONE]", answer
        for event in events:
            assert event.startswith("data: "), event
            chunk = json.loads(event.removeprefix("data: "), parse_constant=_no_constant)
            assert "error" not in chunk, chunk


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def _from_case(case: schemathesis.Case) -> Request:
    made = case.as_transport_kwargs(base_url="http://test")
    wanted = ("method", "url", "headers", "params", "data", "json", "files", "cookies")
    prepared = HttpRequest(**{name: made[name] for name in wanted if name in made}).prepare()
    parts = urlsplit(prepared.url or "")
    body = prepared.body or b""
    return Request(
        method=str(prepared.method),
        path=unquote(parts.path),
        headers=[
            (name.lower().encode("latin-1"), value if isinstance(value, bytes) else value.encode("latin-1"))
            for name, value in prepared.headers.items()
        ],
        body=body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body),
        query=parts.query.encode(),
    )


@contextmanager
def synthetic() -> Iterator[Fuzzer]:
    """A fuzzer of HTTP handling alone."""
    tokenizer = Tokenizer.from_folder(FOLDER)
    with asyncio.Runner() as runner:
        engine = SyntheticEngine(vocab_size=tokenizer.used_vocab_size)
        app = create_app(engine, tokenizer=tokenizer, access=AccessConfig(log="off", max_body_bytes=1 << 18))
        yield Fuzzer(app, runner)
        assert engine.running == 0, "requests that never ended"


@contextmanager
def real() -> Iterator[Fuzzer]:
    """A fuzzer of the whole of a server with a small model."""
    from deployments.local import LocalEngine  # torch, which the synthetic engine does without

    tokenizer = Tokenizer.from_folder(FOLDER)
    config = EngineConfig(
        model=str(FOLDER), device="cpu", num_threads=1, max_model_len=64, max_num_seqs=16, num_kv_blocks=64
    )
    with asyncio.Runner() as runner:
        engine = LocalEngine(config, tokenizer, served_model_name=MODEL.served_model_name)
        app = create_app(engine, tokenizer=tokenizer, access=AccessConfig(log="off", max_body_bytes=1 << 18))

        async def start() -> None:
            engine.start()

        runner.run(start())
        try:
            yield Fuzzer(app, runner)
            assert engine.healthy()
        finally:
            runner.run(engine.close())
