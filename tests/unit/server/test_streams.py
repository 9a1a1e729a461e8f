"""How a stream of events ends, whatever happens to either side of it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from megatron_multiverse.server.encode import LEAST, AnswerResponse, to_json
from megatron_multiverse.server.errors import ApiError, unavailable
from megatron_multiverse.server.logprobs import TokenLogprobs, chat_object, completion_object
from megatron_multiverse.server.streams import DONE, EventStream, event
from tests.unit.server.running import tokenizer
from tests.waiting import PATIENCE_S

Message = dict[str, Any]


class Peer:
    """The two ends that a server gives an application."""

    def __init__(self, *, stalls_after: int = 10**9) -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()
        self._stalls_after = stalls_after

    async def send(self, message: Message) -> None:
        if len(self.sent) >= self._stalls_after:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def run(events: AsyncGenerator[bytes, None], peer: Peer, idle_timeout: float = PATIENCE_S) -> None:
    scope = {"type": "http"}
    stream = EventStream(events, idle_timeout=idle_timeout)
    await asyncio.wait_for(stream(scope, peer.receive, peer.send), PATIENCE_S)


def test_a_complete_stream_ends_with_done_and_a_blank_line() -> None:
    async def main() -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            yield event({"a": "é\n", "b": 1})
            yield DONE

        peer = Peer()
        await run(events(), peer)
        assert peer.body == 'data: {"a":"é\\n","b":1}\n\ndata: [DONE]\n\n'.encode()
        headers = dict(peer.sent[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream") and b"content-length" not in headers
        assert peer.sent[-1] == {"type": "http.response.body", "body": b""}

    asyncio.run(main())


def test_an_event_is_one_line_however_a_client_finds_lines() -> None:
    """httpx, for one, ends them at these characters, which answers hold and JSON leaves as they are."""
    data = {"text": "a\u2028b\u2029c\u0085d\r\n\x0b\x0c\x1c\x1d\x1ee é ü"}
    text = event(data).decode()
    assert len(text.splitlines()) == 2 and json.loads(text.removeprefix("data: ")) == data


def test_minus_infinity_is_a_number_that_json_has() -> None:
    """An infinity in a plain response would be a 500, and no JSON in an event."""
    entries = [
        TokenLogprobs(token, value, [(30, -0.5), (31, -math.inf)]) for token, value in ((31, -math.inf), (5, None))
    ]
    for found in (completion_object(entries, tokenizer()), chat_object(entries, tokenizer())):
        body = AnswerResponse({"logprobs": found}).body
        json.loads(body, parse_constant=pytest.fail)
        assert str(LEAST).encode() in body and event({"logprobs": found}) == b"data: " + body + b"\n\n"
    found = json.loads(to_json(completion_object(entries, tokenizer())))
    assert found["token_logprobs"] == [LEAST, None]
    assert found["top_logprobs"][0][found["tokens"][0]] == LEAST, "the very same number"


def test_answers_are_written_as_pythons_json_writes_them() -> None:
    """Text that names such numbers is text, a number that is none an error, in answers as in events."""
    numbers = [0, -1, 2**70, 1.0, -0.0, 0.1 + 0.2, 5e-324, 1e300]
    data = {"a": ['é\u2028\x00\x7f"\\/<&>', *numbers], "b": (None, True), "c": {"d": {}}}
    for given in (data, data | {"e": "NaN or Infinity"}):
        assert to_json(given) == json.dumps(given, ensure_ascii=False, separators=(",", ":")).encode()
    assert json.loads(to_json([1e-7, 2e-9])) == [1e-7, 2e-9], "the very same, if with fewer digits in the exponent"
    for wrong in (math.nan, "\ud800"):
        with pytest.raises(ValueError):
            to_json([1, wrong])


@pytest.mark.parametrize("error", [unavailable("dead"), ApiError(500, "x")])
def test_an_error_in_the_middle_is_an_object_and_no_done_follows(error: ApiError) -> None:
    async def main() -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            yield event({"a": 1})
            raise error

        peer = Peer()
        await run(events(), peer)
        last = peer.body.split(b"\n\n")[-2].removeprefix(b"data: ")
        assert json.loads(last) == error.body() and b"[DONE]" not in peer.body

    asyncio.run(main())


@pytest.mark.parametrize("reason", ["left", "stalled", "fault"])
def test_the_work_behind_a_stream_ends_with_it(reason: str) -> None:
    async def main() -> None:
        ended = False

        async def events() -> AsyncGenerator[bytes, None]:
            nonlocal ended
            try:
                for k in range(10**6):
                    yield event({"k": k})
                    await asyncio.sleep(0.001)
                    if reason == "fault" and k == 3:
                        raise RuntimeError("a fault of the server")
            finally:
                ended = True

        peer = Peer(stalls_after=3 if reason == "stalled" else 10**9)
        running = asyncio.create_task(run(events(), peer, idle_timeout=0.05 if reason == "stalled" else PATIENCE_S))
        await asyncio.sleep(0.02)
        if reason == "left":
            peer.left.set()
        if reason == "fault":
            with pytest.raises(RuntimeError):
                await running
        else:
            await running
        assert ended and b"[DONE]" not in peer.body

    asyncio.run(main())
