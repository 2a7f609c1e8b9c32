"""Steps reach the followers, unchanged, in order, and from nobody but rank 0."""

from __future__ import annotations

import threading
from dataclasses import fields, replace

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, EngineDeadError
from engine.execution.batch import StepInput, dummy_step
from engine.execution.control import ControlChannel, ControlClient
from engine.execution.messages import Stop, decode_step, encode_step

LOOPBACK = "127.0.0.1"


def same(a: StepInput, b: StepInput) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(StepInput)]
    return all(x.dtype == y.dtype and x.shape == y.shape and (x == y).all() for x, y in pairs)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 30), st.sampled_from([1, 16]))
def test_a_step_survives_the_wire(tokens, seqs, block_size):
    step = dummy_step(tokens, seqs, block_size)
    step = replace(step, logits_rows=step.logits_rows[::2])
    assert same(decode_step(encode_step(step)), step)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_nonsense_is_refused(message):
    with pytest.raises(EngineDeadError, match="malformed step message"):
        decode_step(message)


STEP = dummy_step(20, 3, 4)
BROKEN = {
    "positions": STEP.positions[:-1],
    "slot_mapping": STEP.slot_mapping - 5,
    "block_tables": STEP.block_tables - 1,
    "query_start": STEP.query_start[:-1],
    "context_lens": STEP.context_lens - 3,
    "logits_rows": STEP.logits_rows + 1,
    "token_ids": STEP.token_ids[:-2],
}


@pytest.mark.parametrize("name", BROKEN)
def test_arrays_that_do_not_fit_together_are_refused(name):
    with pytest.raises(EngineDeadError, match="malformed step message"):
        decode_step(encode_step(replace(STEP, **{name: BROKEN[name]})))


def test_requests_out_of_order_are_refused():
    with pytest.raises(EngineDeadError, match="query_start"):
        decode_step(encode_step(replace(STEP, query_start=np.array([0, 14, 7, 20], dtype=np.int32))))


@pytest.fixture
def channel():
    channel = ControlChannel(LOOPBACK, 3)
    yield channel
    channel.close()


def test_every_follower_gets_every_step_in_order_and_then_the_end(channel):
    clients = [ControlClient(channel.address, rank) for rank in (1, 2)]
    steps = [dummy_step(tokens, 2, 4) for tokens in (1, 7, 30)]
    for step in steps:
        channel.send(step)  # the first one waits for the followers
    channel.close()
    for client in clients:
        for step in steps:
            assert same(client.receive(), step)
        assert client.receive() is None
        client.close()


def test_addresses_are_never_the_same_twice(channel):
    other = ControlChannel(LOOPBACK, 2)
    port, secret = channel.address.split("?")
    other_port, other_secret = other.address.split("?")
    assert port != other_port
    assert secret != other_secret
    other.close()


def with_part(address: str, name: str, value: str) -> str:
    endpoint, _, query = address.partition("?")
    parts = dict(part.split("=") for part in query.split("&"))
    return f"{endpoint}?" + "&".join(f"{k}={v}" for k, v in {**parts, name: value}.items())


def hears_nothing(client: ControlClient) -> bool:
    return not client._socket.poll(300)


def test_a_stranger_without_the_token_gets_no_steps(channel):
    stranger = ControlClient(with_part(channel.address, "token", "0" * 64), 1)
    with pytest.raises(EngineDeadError, match=r"rank\(s\) \[1, 2\] did not join within 0.6 s"):
        channel.wait_for_followers(timeout=0.6)
    clients = [ControlClient(channel.address, rank) for rank in (1, 2)]
    channel.send(STEP)
    assert hears_nothing(stranger)
    for client in (stranger, *clients):
        client.close()


def test_a_second_follower_of_the_same_rank_gets_no_steps(channel):
    clients = [ControlClient(channel.address, rank) for rank in (1, 2)]
    channel.wait_for_followers(timeout=30)
    second = ControlClient(channel.address, 1)
    channel.send(STEP)
    assert hears_nothing(second)
    for client in (second, *clients):
        assert client is second or same(client.receive(), STEP)
        client.close()


def test_a_listener_without_the_key_can_not_pose_as_rank_0(channel):
    context = zmq.Context()
    impostor = context.socket(zmq.ROUTER)
    impostor.curve_server = True
    _, impostor.curve_secretkey = zmq.curve_keypair()
    port = impostor.bind_to_random_port(f"tcp://{LOOPBACK}")
    endpoint, _, query = channel.address.partition("?")
    client = ControlClient(f"{endpoint.rpartition(':')[0]}:{port}?{query}", 1)
    assert not impostor.poll(300), "the follower told an impostor its token"
    client.close()
    context.destroy(linger=0)


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"a", b"b"], [b"x" * 5000], [msgspec.msgpack.encode(Stop())]])
def test_strangers_messages_do_no_harm(channel, frames):
    stranger = ControlClient(channel.address, 99)
    stranger._socket.send_multipart(frames)
    clients = [ControlClient(channel.address, rank) for rank in (1, 2)]
    channel.send(STEP)
    for client in clients:
        assert same(client.receive(), STEP)
        client.close()
    stranger.close()


def test_a_follower_learns_that_rank_0_is_gone():
    channel = ControlChannel(LOOPBACK, 2)
    client = ControlClient(channel.address, 1)
    channel.wait_for_followers(timeout=30)
    outcome = []

    def wait() -> None:
        try:
            client.receive()
        except EngineDeadError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    channel._context.destroy(linger=0)  # as when the process dies: no goodbye
    thread.join(30)
    assert outcome == ["lost the connection to rank 0"]
    client.close()


def test_rank_0_learns_that_a_follower_is_gone():
    channel = ControlChannel(LOOPBACK, 2)
    client = ControlClient(channel.address, 1)
    channel.wait_for_followers(timeout=30)
    monitor = channel._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    client.close()
    assert monitor.poll(30_000)
    with pytest.raises(EngineDeadError, match=r"rank\(s\) \[1\] left the control channel"):
        channel.send(STEP)
    channel._socket.disable_monitor()
    channel.close()


def test_waiting_stops_when_it_is_in_vain(channel):
    def check() -> None:
        raise EngineDeadError("rank 1 died")

    with pytest.raises(EngineDeadError, match="rank 1 died"):
        channel.wait_for_followers(check=check)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:5", "tcp://127.0.0.1:5?key=zz&token=a", "127.0.0.1:5?key=00&token=a", ""]
)
def test_malformed_addresses_are_refused(address):
    with pytest.raises(ConfigError):
        ControlClient(address, 1)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1"):
        ControlChannel("192.0.2.1", 2)
