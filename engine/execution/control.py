"""The control channel: rank 0 tells the others what each step is.

Followers dial rank 0 and prove with a token that they belong to the engine; rank 0 proves itself with its CURVE key
(ZeroMQ's encryption, curvezmq.org). Key and token are part of the channel's address, which is therefore a secret:
without it nobody can feed a follower steps, or read them.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from urllib.parse import parse_qs

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from engine.errors import ConfigError, EngineDeadError
from engine.execution.batch import StepInput
from engine.execution.messages import Hello, Stop, decode_step, encode_step
from engine.execution.parallel import split_address

JOIN_TIMEOUT = 120.0
"""Seconds that followers, already loaded, may take to dial in."""
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 20000
"""A peer that lets so long pass without a sign of life is lost, as when its machine went down."""
HELLO_LIMIT = 1024
"""Bytes; rank 0 reads nothing longer."""
LINGER_MS = 1000
"""How long closing waits for the last message to go out."""


class ControlChannel:
    """Rank 0's end. Use it from one thread at a time.

    Args:
        host: an address of this machine that the followers can reach; the port is the system's choice.
        world_size: number of ranks, rank 0 included.

    Attributes:
        address: what followers need to join; a secret.

    Raises:
        ConfigError: `host` is not an address of this machine.
    """

    def __init__(self, host: str, world_size: int) -> None:
        public, private = zmq.curve_keypair()
        self._context = zmq.Context()
        self._socket = _socket(self._context, zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_secretkey = private
        self._socket.maxmsgsize = HELLO_LIMIT
        self._socket.router_mandatory = True
        self._socket.ipv6 = ":" in host
        shown = f"[{host}]" if ":" in host else host
        try:
            port = self._socket.bind_to_random_port(f"tcp://{shown}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"can't listen on {host}: {error}; expected an address of this machine") from error
        self._token = secrets.token_hex(32)
        self.address = f"tcp://{shown}:{port}?key={public.hex()}&token={self._token}"
        self._missing = set(range(1, world_size))
        self._followers: dict[int, bytes] = {}
        self._closed = False

    def wait_for_followers(self, check: Callable[[], None] | None = None, timeout: float = JOIN_TIMEOUT) -> None:
        """Block until every follower has joined; strangers are ignored.

        Args:
            check: called several times a second; raises if waiting is in vain.
            timeout: seconds.

        Raises:
            EngineDeadError: some did not come in time.
        """
        deadline = time.monotonic() + timeout
        while self._missing:
            if check is not None:
                check()
            if time.monotonic() > deadline:
                raise EngineDeadError(f"rank(s) {sorted(self._missing)} did not join within {timeout:g} s")
            if self._socket.poll(200):
                identity, *frames = self._socket.recv_multipart()
                self._admit(identity, b"".join(frames))

    def send(self, step: StepInput) -> None:
        """Tell all followers to run `step`; the first call waits for them to join.

        Raises:
            EngineDeadError: a follower is gone.
        """
        if self._missing:
            self.wait_for_followers()
        self._send(encode_step(step))

    def close(self) -> None:
        """Tell the followers to end; may be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self._send(msgspec.msgpack.encode(Stop()))
        except EngineDeadError:
            pass  # one is gone already; the others were told
        finally:
            self._context.destroy(linger=LINGER_MS)

    def _admit(self, identity: bytes, message: bytes) -> None:
        try:
            hello = msgspec.msgpack.decode(message, type=Hello)
        except msgspec.MsgspecError:
            return
        if hmac.compare_digest(hello.token.encode(), self._token.encode()) and hello.rank in self._missing:
            self._missing.remove(hello.rank)
            self._followers[hello.rank] = identity

    def _send(self, message: bytes) -> None:
        lost = []
        for rank, identity in self._followers.items():
            try:
                self._socket.send_multipart((identity, message))
            except zmq.ZMQError:
                lost.append(rank)
        if lost:
            raise EngineDeadError(f"rank(s) {lost} left the control channel")


class ControlClient:
    """A follower's end.

    Args:
        address: `ControlChannel.address`.
        rank: of the follower.

    Raises:
        ConfigError: the address is malformed.
    """

    def __init__(self, address: str, rank: int) -> None:
        endpoint, _, query = address.partition("?")
        host, _ = split_address(endpoint)
        secret = {name: values[0] for name, values in parse_qs(query).items()}
        try:
            key, token = bytes.fromhex(secret["key"]), secret["token"]
        except (KeyError, ValueError):
            raise ConfigError("the control address lacks its key or token; expected ControlChannel.address") from None
        self._context = zmq.Context()
        self._socket = _socket(self._context, zmq.DEALER)
        self._socket.ipv6 = ":" in host
        self._socket.curve_serverkey = key
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)
        self._socket.send(msgspec.msgpack.encode(Hello(token, rank)))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def receive(self) -> StepInput | None:
        """Block until the next step; None at the end.

        Raises:
            EngineDeadError: rank 0 is gone, or sent nonsense.
        """
        ready = dict(self._poller.poll())
        if self._socket in ready:
            return decode_step(self._socket.recv())
        recv_monitor_message(self._monitor)
        raise EngineDeadError("lost the connection to rank 0")

    def close(self) -> None:
        """Hang up."""
        self._socket.disable_monitor()
        self._context.destroy(linger=0)


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    return socket
