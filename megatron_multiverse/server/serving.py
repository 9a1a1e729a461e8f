"""From a checked request to answers, whole or piece by piece: what the routes that generate text share."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from operator import attrgetter

from starlette.requests import ClientDisconnect, Request

from megatron_multiverse.inference.text.detokenize import IncrementalDetokenizer
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server.answer import AnswerTree, BranchNode, Piece, ThoughtSplitter, answer_texts
from megatron_multiverse.server.batch import Asked, Batch, Write
from megatron_multiverse.server.engine_client import EngineClient
from megatron_multiverse.server.errors import unavailable
from megatron_multiverse.server.fields import GenerationFields
from megatron_multiverse.server.logprobs import TokenLogprobs
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.shapes import check_result
from megatron_multiverse.server.streams import PING_SECONDS, disconnected
from megatron_multiverse.structure import Tag


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


async def pieces(request: Request, batch: Batch, fields: GenerationFields) -> AsyncGenerator[Piece | None, None]:
    """What answers become, as it happens; None now and then while nothing does. Ends when all are complete.

    Raises:
        ApiError: the engine failed.
    """
    model: ServedModel = request.app.state.model
    kind = _BranchPieces if fields.ours.stream_mode == "branches" else _LinearPieces
    writers = [kind(index, model, fields) for index in range(len(batch.generations))]
    started, heard = time.monotonic(), False
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


class _LinearPieces:
    """Pieces of one answer in the order of its text: what paths write waits until those before them have ended.

    A stop text is no part of the text, so what could become one is held back until it is known.
    """

    def __init__(self, index: int, model: ServedModel, fields: GenerationFields) -> None:
        self._index = index
        self._model = model
        self._tree = _tree(model)
        self._splitter = ThoughtSplitter(model.tokenizer, split=fields.ours.separate_reasoning)
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        self._held_back = max((len(text) - 1 for text in stop), default=0)
        self._text = self._thought = ""  # what is known
        self._sent = [0, 0]  # characters of each that are out

    def push(self, writes: Sequence[Write], result: Result | None) -> list[Piece]:
        for write in writes:
            self._tree.push(write.branch, write.tokens)
        if result is not None:
            self._tree.finish()
        tokens = self._tree.take()
        self._take(*self._splitter.push([token.token for token in tokens]))
        if result is None:
            end = self._held_back
        else:
            check_result(result)
            self._take(*self._splitter.finish())
            end = 0
            if result.stops:
                self._text, self._thought = answer_texts(result, self._model.tokenizer, split=self._splitter.splits)
        text, thought = self._new(0, self._text, end), self._new(1, self._thought, end)
        if not (text or thought or tokens or result):
            return []
        return [Piece(index=self._index, text=text, thought=thought, tokens=tokens, result=result)]

    def _take(self, text: str, thought: str) -> None:
        self._text += text
        self._thought += thought

    def _new(self, which: int, text: str, held_back: int) -> str:
        start, self._sent[which] = self._sent[which], max(self._sent[which], len(text) - held_back)
        return text[start : self._sent[which]]


class _BranchPieces:
    """Pieces of one answer as its branches write, each with the name of its branch."""

    def __init__(self, index: int, model: ServedModel, fields: GenerationFields) -> None:
        self._index = index
        self._detokenize = model.tokenizer.detokenize
        self._tree = _tree(model)
        self._detokenizers: dict[BranchNode[TokenLogprobs], IncrementalDetokenizer] = {}

    def push(self, writes: Sequence[Write], result: Result | None) -> list[Piece]:
        found = []
        for write in writes:
            node = self._tree.push(write.branch, tokens := write.tokens)
            opens = node not in self._detokenizers
            detokenizer = self._detokenizers.setdefault(node, IncrementalDetokenizer(self._detokenize))
            text = detokenizer.push(write.ids) + (detokenizer.finish() if node.ended else "")
            found.append(
                Piece(
                    index=self._index,
                    text=text,
                    branch=write.branch,
                    block=node.block,
                    tokens=tokens,
                    opens=opens and node.block > 0,
                    closes=node.ended,
                )
            )
        if result is not None:
            check_result(result)
            root = self._tree.root
            rest = self._detokenizers[root].finish() if root in self._detokenizers else ""
            found.append(Piece(index=self._index, text=rest, branch="", result=result))
        return found


def _tree(model: ServedModel) -> AnswerTree[TokenLogprobs]:
    return AnswerTree(model.tokenizer.structure_vocab.tag_ids[Tag.END_PATH], attrgetter("token"))
