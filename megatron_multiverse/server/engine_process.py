"""The engine process: owns the engine, reads commands, steps, reports. Started by `engine_client.py`.

Where a model is spread over several ranks there is such a process for each. The first one has the engine, the others
run its plans; their channels only show that they live. None knows of HTTP or text. Messages (see `wire.py`), by their
field "op":

- in: start (first), add, cancel; pause, continue, flush, update, join, receive, leave, rename, check, release,
  resume;
- out: ready or failed (once, first), accepted or refused (for each add), step (what was written
  and what finished), controlled (for each message of the second kind), beat.

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
from collections.abc import Iterable
from typing import Any

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.dtypes import engine_dtype
from megatron_multiverse.errors import ContextError, GenerationError, MultiverseError
from megatron_multiverse.inference.build import build_engine, engine_ranks
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.first_requests import warm_up
from megatron_multiverse.inference.record import to_values
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.inference.text.state import Written
from megatron_multiverse.model.device import choose_device, device_name
from megatron_multiverse.server.engine_control import EngineControl
from megatron_multiverse.server.garbage import freeze_objects
from megatron_multiverse.server.rank_model import follow_control
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
        folder: the checkpoint that the engine's weights are from.
    """

    def __init__(self, engine: Engine, channel: Channel, folder: str) -> None:
        self.control = EngineControl(engine, folder)
        self.channel = channel
        self._paused = False
        self._engine_ids: dict[int, int] = {}  # their number of an answer -> the engine's
        self._their_ids: dict[int, int] = {}
        self._writes: list[tuple[Any, ...]] = []  # number, and the fields of `Write`
        self._failures = 0
        self._last_beat = 0.0
        self._step_counts = [0] * (len(STEP_SECONDS) + 1)
        self._step_seconds = 0.0

    @property
    def engine(self) -> Engine:
        """The engine; there is none while its memory is given back."""
        return self.control.engine

    def run(self) -> None:
        """Serve until the other side closes."""
        warm_up(self.engine)
        freeze_objects()
        self.channel.send({"op": "ready", "facts": self._facts(), "control": self._control_state()})
        while not self.channel.closed:
            busy = self.control.has_work and not self._paused
            waits_to_send = [self.channel] if self.channel.is_behind else []
            select.select([self.channel], waits_to_send, [], 0 if busy else BEAT_SECONDS)
            for message in self.channel.receive():
                self._handle(message)
            if self.control.has_work:
                self._hold() if self._paused else self._step()
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
                self._cancel(ids)
            else:
                self._control(message)
        except GenerationError as error:
            code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_value"
            self.channel.send({"op": "refused", "ids": ids, "message": str(error), "code": code})
        except Exception:
            logger.exception("message %r failed", message["op"])
            self.channel.send({"op": "refused", "ids": ids, "message": ""})

    def _cancel(self, ids: Iterable[int]) -> None:
        for number in self._engine_ids.keys() & ids:
            self.engine.cancel(self._engine_ids[number])

    def _control(self, message: Message) -> None:
        """Do something to the engine as a whole, and say whether that went well."""
        error = ""
        try:
            self._act(message)
        except (MultiverseError, OSError) as fault:
            error = str(fault)
        except Exception:  # whatever it is, somebody waits for the answer
            logger.exception("%s failed", message["op"])
            error = f"{message['op']} failed in the engine; its log says why"
        told = {"error": error, "control": self._control_state()}
        self.channel.send({"op": "controlled", "number": message["number"]} | told)

    def _control_state(self) -> dict[str, Any]:
        """What the other side keeps as its `EngineState`."""
        control = self.control
        facts = {"released": sorted(control.released), "versions": control.versions, "weights": control.weights}
        return {"paused": self._paused, "incomplete": control.incomplete, **facts}

    def _act(self, message: Message) -> None:
        op = message["op"]
        if message.get("abort"):
            self._cancel(list(self._engine_ids))
        if op == "pause":
            if message["mode"] == "abort":
                self._cancel(list(self._engine_ids))
            elif message["mode"] == "retract" and self.control.has_work:
                self.engine.use_weights(self.engine.weight_version)  # the same ones; all step back
            self._paused = True
        elif op == "continue":
            self._paused = False
        elif op == "flush":
            if self.engine.scheduler.active:
                raise GenerationError("answers are in work; pause with mode abort or retract, or wait for them")
            self.engine.scheduler.places.prefixes.clear()
        elif op == "update":
            self.control.update(message["folder"], message["version"])
            self._paused = self._paused or message["keep_pause"]
        elif op in ("join", "leave", "receive", "rename", "check"):
            getattr(self.control, op)(**message["options"])
        elif op == "release":
            self.control.release(set(message["regions"]))
        elif op == "resume":
            self.control.resume(set(message["regions"]))
        else:
            raise GenerationError(f"no operation {op!r}")

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
                priority=message["priority"],
                replay_structure=message["replay_structure"],
                answer_start=message["answer_start"],
                thought=message["thought"],
            )
            own = self.engine.add_request(request, on_token=self._hear if message["stream"] else None)
            for k, number in enumerate(ids[start : start + together]):
                self._engine_ids[number], self._their_ids[own + k] = own + k, number
        self.channel.send({"op": "accepted", "ids": ids})

    def _hear(self, request_id: int, branch: str, ids: Written) -> None:
        stop = None if ids.stop is None else (ids.stop.end - ids.stop.start, ids.stop.kept)
        self._writes.append((self._their_ids[request_id], branch, list(ids), ids.logprob, ids.top, stop))

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
        self._count(time.perf_counter() - start)
        self._report(results)

    def _hold(self) -> None:
        """Nothing runs; only what was cancelled ends."""
        self._report(self.engine.take_cancelled())

    def _count(self, seconds: float) -> None:
        self._step_counts[bisect.bisect_left(STEP_SECONDS, seconds)] += 1
        self._step_seconds += seconds

    def _report(self, results: list[Result]) -> None:
        if not results and not self._writes:
            return
        done = []
        for result in results:
            number = self._their_ids.pop(result.request_id)
            del self._engine_ids[number]
            done.append((number, to_values(result)))
        self.channel.send({"op": "step", "writes": self._writes, "done": done})
        self._writes = []

    def _facts(self) -> dict[str, Any]:
        """What the other side needs to know of the engine to check requests and to tell of it by itself."""
        return {
            "device": device_name(self.control.device),
            "max_position": self.engine.max_position,
            "num_pages": self.engine.book.num_pages,
            "page_size": self.engine.book.page_size,
            "max_rows": self.engine.config.max_rows,
        }

    def _stats(self) -> dict[str, Any]:
        times = {"step_counts": self._step_counts, "step_seconds": self._step_seconds}
        if self.control.released:
            return times
        scheduler, book, graphs = self.engine.scheduler, self.engine.book, self.engine.runner.graphs
        return times | {
            "steps": self.engine.num_steps,
            "copied_tokens": self.engine.copied_tokens,
            "graph_steps": graphs.replays if graphs is not None else 0,
            "running": len(scheduler.active),
            "waiting": len(scheduler.waiting),
            "branches": len(scheduler.places.nodes),
            "pages_free": book.available,
            "pages_cached": len(scheduler.places.prefixes),
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
    with engine_ranks(tensor, pipeline, rendezvous_url=options["rendezvous_url"]) as ranks:
        device = choose_device(options["device"])
        dtype = engine_dtype(options["dtype"], device)
        if not ranks.is_first:
            follow_control(load_checkpoint(options["load"], dtype=dtype, device=device)[0], options["load"])
            return
        tokenizer = build_tokenizer(options["tokenizer_type"], options["tokenizer_model"])
        config = EngineConfig(**options["engine"])
        engine = build_engine(options["load"], tokenizer, config, dtype=dtype, device=device)
        host = EngineHost(engine, channel, options["load"])
        del engine  # whoever keeps it keeps its memory
        host.run()
        host.control.close()


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
