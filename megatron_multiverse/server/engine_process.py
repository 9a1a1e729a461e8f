"""The engine process: owns the engine, reads commands, steps, reports. Started by `engine_client.py`.

Where a model is spread over several ranks there is such a process for each. The first one has the engine, the others
run its plans; their channels only show that they live. None knows of HTTP or text. Messages (see `wire.py`), by their
field "op":

- in: start (first), add, cancel;
- out: ready or failed (once, first), accepted or refused (for each add), step (what was written
  and what finished), beat.

It ends when the other side of the socket closes, whatever the reason, so no engine is left behind.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import select
import signal
import socket
import sys
import time
from typing import Any

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.errors import GenerationError, MultiverseError
from megatron_multiverse.inference.build import build_engine, engine_ranks, follow_engine
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.model.device import choose_device
from megatron_multiverse.server.results import result_to_dict
from megatron_multiverse.server.wire import STEP_SECONDS, Channel, Message

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
MOST_FAILURES = 20
"""Steps that raise in a row before the process gives up: requests end after three, so it is none of theirs."""


class EngineHost:
    """Runs an engine for whoever is at the other end of a channel.

    Args:
        engine: nobody else may step it.
        channel: to the HTTP process.
    """

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self.engine = engine
        self.channel = channel
        self._engine_ids: dict[int, int] = {}  # their number of an answer -> the engine's
        self._their_ids: dict[int, int] = {}
        self._writes: list[tuple[int, str, list[int]]] = []
        self._failures = 0
        self._last_beat = 0.0
        self._step_counts = [0] * (len(STEP_SECONDS) + 1)
        self._step_seconds = 0.0

    def run(self) -> None:
        """Serve until the other side closes."""
        self._warm_up()
        self.channel.send({"op": "ready", "facts": self._facts()})
        while not self.channel.closed:
            busy = self.engine.has_work
            waits_to_send = [self.channel] if self.channel.is_behind else []
            select.select([self.channel], waits_to_send, [], 0 if busy else BEAT_SECONDS)
            for message in self.channel.receive():
                self._handle(message)
            if self.engine.has_work:
                self._step()
            if time.monotonic() - self._last_beat >= BEAT_SECONDS:
                self._last_beat = time.monotonic()
                self.channel.send({"op": "beat", "stats": self._stats()})
            self.channel.flush()

    def _handle(self, message: Message) -> None:
        ids = message.get("ids", [])
        try:
            if message["op"] == "add":
                self._add(message)
            elif message["op"] == "cancel":
                for number in self._engine_ids.keys() & ids:
                    self.engine.cancel(self._engine_ids[number])
        except GenerationError as error:
            self.channel.send({"op": "refused", "ids": ids, "message": str(error)})
        except Exception:
            logger.exception("message %r failed", message["op"])
            self.channel.send({"op": "refused", "ids": ids, "message": ""})

    def _add(self, message: Message) -> None:
        """Answers to one prompt; if they are drawn at random, as one request, which computes the prompt once."""
        ids = message["ids"]
        sampling = SamplingParams(**message["sampling"])
        together = len(ids) if sampling.temperature > 0 else 1  # the engine takes greedy answers one by one
        for start in range(0, len(ids), together):
            request = Request(
                prompt_ids=message["prompt_ids"],
                sampling=dataclasses.replace(sampling, n=together),
                sample=start,
                cache_salt=message["cache_salt"],
            )
            own = self.engine.add_request(request, on_token=self._hear if message["stream"] else None)
            for k, number in enumerate(ids[start : start + together]):
                self._engine_ids[number], self._their_ids[own + k] = own + k, number
        self.channel.send({"op": "accepted", "ids": ids})

    def _hear(self, request_id: int, branch: str, ids: list[int]) -> None:
        self._writes.append((self._their_ids[request_id], branch, ids))

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            results = self.engine.step()
            self._failures = 0
        except Exception:
            logger.exception("a step failed")
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                raise
            return
        seconds = time.perf_counter() - start
        self._step_counts[bisect.bisect_left(STEP_SECONDS, seconds)] += 1
        self._step_seconds += seconds
        if not results and not self._writes:
            return
        done = []
        for result in results:
            number = self._their_ids.pop(result.request_id)
            del self._engine_ids[number]
            done.append((number, result_to_dict(result)))
        self.channel.send({"op": "step", "writes": self._writes, "done": done})
        self._writes = []

    def _warm_up(self) -> None:
        """Take a first step, which is slower than the others, before anybody waits for it."""
        self.engine.generate([Request(prompt_ids=[0], sampling=SamplingParams(max_tokens=1))])

    def _facts(self) -> dict[str, Any]:
        """What the other side needs to know of the engine to check requests by itself."""
        return {
            "max_position": self.engine.max_position,
            "num_pages": self.engine.book.num_pages,
            "page_size": self.engine.book.page_size,
            "max_rows": self.engine.config.max_rows,
        }

    def _stats(self) -> dict[str, Any]:
        scheduler, book = self.engine.scheduler, self.engine.book
        return {
            "steps": self.engine.num_steps,
            "running": len(scheduler.active),
            "waiting": len(scheduler.waiting),
            "branches": len(scheduler.nodes),
            "pages_free": book.available,
            "pages_cached": len(scheduler.prefixes),
            "step_counts": self._step_counts,
            "step_seconds": self._step_seconds,
        }


def _options(channel: Channel) -> Message | None:
    """The first message; None if the other side went away before."""
    messages: list[Message] = []
    while not messages and not channel.closed:
        select.select([channel], [], [])
        messages = list(channel.receive())
    return messages[0] if messages else None


def _serve(channel: Channel, options: Message) -> None:
    """Build this rank's part of the engine and run it until the other side closes."""
    tensor, pipeline = options["parallel_sizes"]
    dtype = DTYPES[options["dtype"]]
    with engine_ranks(tensor, pipeline, rendezvous_url=options["rendezvous_url"]) as ranks:
        device = choose_device(options["device"])
        if not ranks.is_first:
            follow_engine(options["load"], dtype=dtype, device=device)
            return
        tokenizer = build_tokenizer(options["tokenizer_type"], options["tokenizer_model"])
        config = EngineConfig(**options["engine"])
        engine = build_engine(options["load"], tokenizer, config, dtype=dtype, device=device)
        EngineHost(engine, channel).run()
        engine.close()


def main() -> None:
    """Serve the socket whose number is the only argument."""
    # Both reach the whole process group, in a terminal and under SLURM. The HTTP process decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    options = _options(channel)
    if options is None:
        return
    logging.basicConfig(level=options["log_level"].upper(), format="%(asctime)s engine: %(message)s")
    try:
        _serve(channel, options)
    except (MultiverseError, OSError) as error:
        channel.send({"op": "failed", "message": str(error)})
    while channel.is_behind and not channel.closed:
        select.select([], [channel], [])
        channel.flush()


if __name__ == "__main__":
    main()
