"""Messages between the processes arrive whole, whatever their size, and no slow reader holds up a sender."""

from __future__ import annotations

import random
import socket

from megatron_multiverse.inference.record import from_values, to_values
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.wire import Channel, pack
from tests.unit.inference.toy import NullModel, SoupSampler, ask, toy_engine


def test_messages_arrive_whole_and_in_order() -> None:
    rng = random.Random(0)
    messages = [{"op": "x", "id": k, "ids": list(range(rng.choice([0, 3, 40_000])))} for k in range(60)]
    one, other = socket.socketpair()
    sender, receiver = Channel(one), Channel(other)
    found = []
    for message in messages:
        sender.send(message)
        found += receiver.receive()
    while len(found) < len(messages):
        sender.flush()
        found += receiver.receive()
    assert found == messages and not sender.is_behind


def test_bytes_may_come_in_any_pieces() -> None:
    one, other = socket.socketpair()
    receiver = Channel(other)
    data = pack({"a": [1, 2.5, None, "é", True]}) + pack({"b": {}})
    found = []
    for k in range(len(data)):
        one.send(data[k : k + 1])
        found += receiver.receive()
    assert found == [{"a": [1, 2.5, None, "é", True]}, {"b": {}}]


def test_nobody_waits_for_a_slow_reader() -> None:
    one, other = socket.socketpair()
    sender, receiver = Channel(one), Channel(other)
    for k in range(50):  # more than the socket holds: to wait for the reader would be to wait for ever
        sender.send({"k": k, "data": b"x" * 100_000})
    assert sender.is_behind
    found: list[dict[str, object]] = []
    while len(found) < 50:
        found += receiver.receive()
        sender.flush()
    assert [message["k"] for message in found] == list(range(50))


def test_the_end_of_the_other_side_is_noticed() -> None:
    for end_by_reading in (True, False):
        one, other = socket.socketpair()
        channel = Channel(one)
        other.close()
        if end_by_reading:
            assert list(channel.receive()) == []
        else:
            channel.send({"a": 1})
        assert channel.closed


def test_results_travel_unchanged() -> None:
    engine = toy_engine(NullModel(), sampler=SoupSampler(1))
    results: list[Result] = engine.generate([ask([30], sample=k, max_tokens=300, logprobs=k % 3) for k in range(10)])
    assert any(result.blocks for result in results)
    one, other = socket.socketpair()
    sender, receiver = Channel(one), Channel(other)
    for result in results:
        sender.send(to_values(result))
        (fields,) = receiver.receive()
        assert from_values(fields) == result
