"""What every request passes before a route sees it, as plain ASGI: wrapping classes that build on queues and tasks of
their own would delay chunks and hide a client's disconnect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.access.call import CALL, Call, request_id
from deployments.access.config import AccessConfig
from deployments.access.keyring import Keyring
from deployments.access.keys import ApiKey
from deployments.access.limits import KeyLimits, Slots, go_duration
from deployments.access.log import AccessLog
from deployments.observer import Observer
from deployments.openai.answer import Job
from deployments.openai.errors import ApiError, from_exception, retry_headers
from deployments.openai.generation import Engine
from deployments.openai.http import send_error
from engine.errors import RequestError
from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

POLLED = ("/state", "/metrics")
"""Paths that are asked every few seconds, whose good answers are not logged."""

_READING = ("GET", "HEAD", "OPTIONS")
_METHODS = (*_READING, "POST", "PUT", "PATCH", "DELETE")
_ASK_FOR_KEY = {"www-authenticate": "Bearer"}


class Access:
    """Keys, limits and the log of one ingress process.

    Args:
        processes: how many ingress processes share each key's limits, asked again with every reload.
        answer_request_id: whether answers carry X-Request-Id. Serve adds it itself, so not behind Serve.

    Raises:
        ConfigError: the keys can't be read, or the log can't be opened.
    """

    def __init__(
        self,
        config: AccessConfig,
        engine: Engine,
        *,
        tokenizer: Tokenizer,
        observer: Observer,
        processes: Callable[[], int] = lambda: 1,
        answer_request_id: bool = True,
    ) -> None:
        self.config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._observer = observer
        self._processes = processes
        self._share = max(processes(), 1)
        self.answer_request_id = answer_request_id
        self._in_flight = Slots(config.max_requests_in_flight)
        self._limits: dict[str, KeyLimits] = {}
        self._keyring = Keyring(config, on_change=self._configure)
        self.log = AccessLog(config.log)
        self._watcher: asyncio.Task[None] | None = None
        if not self._keyring.required:
            logger.info("No API keys are configured: whoever reaches this server is served.")

    async def start(self) -> None:
        """Begin to watch the key file; on the event loop that serves."""
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop watching and close the log."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait((self._watcher,))
        self.log.close()

    async def reload(self) -> None:
        """Read the key file if it has changed, and share the limits anew if the number of processes has."""
        await self._keyring.reload()
        if (share := max(self._processes(), 1)) != self._share:
            self._share = share
            self._configure(self._keyring.keys)

    def authorize(self, call: Call, scope: Scope) -> None:
        """Find out whose request it is, whether it is allowed, and whether there is room for it.

        Raises:
            ApiError: 401, 403 or 429.
        """
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        working = scope["method"] not in _READING
        if self._keyring.required and path not in self.config.public_paths:
            key = self._authenticate(call, scope)
            # Who may not use the model can still read metrics and pages, for which keys without models are made.
            if (working or path.startswith("/v1/")) and not key.allows(self._engine.info.served_model_name):
                call.refused = "forbidden"
                raise ApiError(403, f"The key {key.name!r} is not for this model", code="insufficient_permissions")
        if working:
            self._enter(call)

    def admit(self, call: Call, job: Job) -> None:
        """Check a prompt against the limits on tokens; see :meth:`Call.admit`.

        Raises:
            ApiError, RequestError: it is refused.
        """
        prompts = [choice.request.prompt_token_ids for choice in job.choices[:: job.choices_per_prompt]]
        tokens = sum(map(len, prompts))
        call.model = self._engine.info.served_model_name
        most = self.config.max_prompt_tokens
        if most is not None and tokens > most:
            raise RequestError(
                f"The request has {tokens} prompt tokens; this server takes {most}", code="context_length_exceeded"
            )
        if call.limits is not None:
            try:
                call.limits.take_prompt(tokens, now=monotonic())
            except ApiError:
                call.refused = "rate_limit"
                raise

    def finish(self, call: Call, scope: Scope) -> None:
        """Give back what a request held, and write its line."""
        call.end()
        if call.refused is not None:
            self._observer.refused(call.refused)
        if not self.log.on:
            return
        route = scope.get("route")
        pattern = getattr(route, "path", None)
        if call.status == 200 and (pattern in self.config.public_paths or pattern in POLLED):
            return  # probes, and whoever watches
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"] if scope["method"] in _METHODS else None,
            "route": pattern,
            **call.fields(),
        }
        if self.config.log_prompts:
            prompts = [choice.request.prompt_token_ids for choice in call.choices[:: call.choices_per_prompt]]
            fields["prompts"] = [self._tokenizer.decode(prompt) for prompt in prompts]
        self.log.write(fields)

    def _authenticate(self, call: Call, scope: Scope) -> ApiKey:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            call.refused = "unauthorized"
            message = "No API key: send one in the header 'Authorization: Bearer ...'"
            raise ApiError(401, message, code="invalid_api_key", headers=_ASK_FOR_KEY)
        kind, _, presented = given[0].partition(b" ")
        key = None
        if len(given) == 1 and kind.lower() == b"bearer":
            key = self._keyring.find(presented.strip())
        if key is None:
            call.refused = "unauthorized"
            raise ApiError(401, "The API key is not known here", code="invalid_api_key", headers=_ASK_FOR_KEY)
        call.key = key
        if (refusal := key.refusal(datetime.now(UTC))) is not None:
            call.refused = "unauthorized"
            message = f"The API key {key.name!r} {refusal}"
            raise ApiError(401, message, code="invalid_api_key", headers=_ASK_FOR_KEY)
        call.limits = self._limits[key.id]
        return key

    def _enter(self, call: Call) -> None:
        now = monotonic()
        places = self._in_flight
        if places.full:
            call.refused = "overloaded"
            wait_s = places.promise_s(now=now)
            message = (
                f"The server is working on {places.limit} requests, its limit. Try again in {go_duration(wait_s)}."
            )
            raise ApiError(429, message, type="requests", code="rate_limit_exceeded", headers=retry_headers(wait_s))
        if call.limits is not None:
            try:
                slots = call.limits.enter(now=now)
            except ApiError:
                call.refused = "rate_limit"
                raise
            if slots is not None:
                call.slots.append(slots)
        places.acquire()
        call.slots.append(places)

    def _configure(self, keys: tuple[ApiKey, ...]) -> None:
        now = monotonic()
        known, self._limits = self._limits, {}
        for key in keys:
            limits = known.get(key.id)
            if limits is None:
                limits = KeyLimits(key, processes=self._share, now=now)
            else:
                limits.configure(key, processes=self._share, now=now)
            self._limits[key.id] = limits

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.config.reload_seconds)
            try:
                await self.reload()
            except Exception:
                logger.exception("The keys could not be looked at; those read before stay in force")


class AccessMiddleware:
    """Runs each request under an :class:`Access`: everything between it and the client goes through a :class:`Call`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. No websocket is served here, so none gets past the keys."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        access = self._access
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        identity = request_id(given)
        fields = [(b"x-request-id", identity.encode())] if access.answer_request_id else []
        call = scope[CALL] = Call(send, access.admit, request_id=identity, fields=fields)
        try:
            access.authorize(call, scope)
            if scope["method"] not in _READING:
                receive = self._hurried(receive)
            await self._app(scope, receive, call.send)
        except Exception as error:
            if call.status is not None:
                raise  # too late for an answer; the server closes the connection
            await send_error(call.send, from_exception(error))
        finally:
            access.finish(call, scope)

    def _hurried(self, receive: Receive) -> Receive:
        """``receive`` that gives up on a client that is slow to send its body."""
        seconds = self._access.config.body_timeout_s
        deadline = asyncio.get_running_loop().time() + seconds
        complete = False

        async def hurried() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    message = await receive()
                complete = not message.get("more_body", False)
                return message
            raise ApiError(408, f"The request body did not arrive within {seconds:g} seconds")

        return hurried
