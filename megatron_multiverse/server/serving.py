"""From a checked request to answers, whole or piece by piece: what the routes that generate text share."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator

from starlette.requests import ClientDisconnect, Request

from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.answer import Piece
from megatron_multiverse.server.batch import Asked, Batch
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.errors import unavailable
from megatron_multiverse.server.fields import GenerationFields
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.pieces import BranchPieces, LinearPieces
from megatron_multiverse.server.shapes import check_result
from megatron_multiverse.server.streams import PING_SECONDS, disconnected


async def submit(request: Request, asked: Asked, *, stream: bool) -> Batch:
    """Hand the engine what was asked for.

    Raises:
        ApiError: 400, 429 or 503; nothing is left running then.
    """
    state = request.app.state
    if state.draining:
        raise unavailable("draining")
    client: EngineClient = state.client
    client.check_room(len(asked.prompts) * asked.count)
    client.check_lengths(asked)
    # How long a prompt takes tells whether another began alike; so each key has a cache of its own.
    salt = repr((request.headers.get("authorization"), asked.cache_salt))
    salt = hashlib.sha256(salt.encode()).hexdigest()
    batch = client.submit(asked, stream=stream, cache_salt=salt)
    try:
        await batch.accepted()
    except BaseException:
        batch.cancel()
        raise
    return batch


async def complete(request: Request, asked: Asked) -> list[Result]:
    """The answers, complete; none where the client leaves before.

    Raises:
        ApiError: 400, 429, 500 or 503.
        ClientDisconnect: nobody waits any more; the answers are cancelled.
    """
    batch = await submit(request, asked, stream=False)
    working = asyncio.create_task(batch.results())
    leaving = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        results = working.result()
    finally:
        batch.cancel()
        for task in (working, leaving):
            task.cancel()
    for result in results:
        check_result(result)
    return results


async def pieces(
    request: Request, batch: Batch, fields: GenerationFields, *, in_thought: bool
) -> AsyncGenerator[Piece | None, None]:
    """What answers become, as it happens; None now and then while nothing does. Ends when all are complete.

    Args:
        request: of the client.
        batch: the answers.
        fields: of the request.
        in_thought: whether they begin in a thought.

    Raises:
        ApiError: the engine failed.
    """
    model: ServedModel = request.app.state.model
    kind = BranchPieces if fields.ours.stream_mode == "branches" else LinearPieces
    writers = [kind(index, model, fields, in_thought=in_thought) for index in range(len(batch.generations))]
    started, heard = batch.generations[0].started, False
    try:
        going = len(writers)
        while going:
            news = await batch.news(PING_SECONDS)
            if not news:
                yield None
            for index, writes, result in news:
                going -= result is not None
                if writes and not heard:
                    heard = True
                    request.app.state.metrics.first_token.observe(time.monotonic() - started)
                for piece in writers[index].push(writes, result):
                    yield piece
    finally:
        batch.cancel()
