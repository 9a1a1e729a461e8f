"""Answers of OpenAI's routes as objects: whole, or as the events of a stream. A route says what its choices hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.server import shapes
from megatron_multiverse.server.answer import Piece
from megatron_multiverse.server.batch import Asked, Batch
from megatron_multiverse.server.encode import AnswerResponse
from megatron_multiverse.server.fields import GenerationFields
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.serving import complete, pieces, submit
from megatron_multiverse.server.streams import DONE, PING, EventStream, event

F = TypeVar("F", bound=GenerationFields)


class ChoiceAnswer(ABC, Generic[F]):
    """The answer to one request.

    Args:
        request: that it answers.
        fields: of the request.
        prompts: ids of each prompt.
        in_thought: whether the answers begin in a thought, where a route tells that from the rest.
    """

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    """What the field `object` of a whole answer says."""
    chunk_kind: ClassVar[str]
    """The same of each chunk of a stream."""
    has_one_prompt: ClassVar[bool]
    """Whether all choices answer one prompt, whose ids then stand beside them, not in them."""

    def __init__(
        self, request: Request, fields: F, prompts: Sequence[Sequence[int]], *, in_thought: bool = False
    ) -> None:
        self.request = request
        self.in_thought = in_thought
        self.fields = fields
        self.prompts = prompts
        self.model: ServedModel = request.app.state.model

    def shown(self, result: Result) -> Result:
        """What the client is to see of a complete answer."""
        return result

    @abstractmethod
    def whole(self, index: int, result: Result) -> dict[str, Any]:
        """The choice of a complete answer."""

    @abstractmethod
    async def opening(self, index: int) -> dict[str, Any]:
        """The choice of the first chunk of an answer, before anything of it is known."""

    @abstractmethod
    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices of chunks that tell of a piece."""

    async def respond(self, asked: Asked) -> Response:
        """Have the engine answer, and send it as the request wants it.

        Raises:
            ApiError: 400, 422, 429, 500 or 503.
            ClientDisconnect: nobody waits any more.
        """
        if self.fields.stream:
            batch = await submit(self.request, asked, stream=True)
            return EventStream(
                self._events(batch), idle_timeout=self.request.app.state.config.limits.idle_stream_timeout
            )
        results = [self.shown(result) for result in await complete(self.request, asked)]
        choices = [self.whole(index, result) for index, result in enumerate(results)]
        if not self.has_one_prompt:
            choices = [choice | self._prompt_ids(index) for index, choice in enumerate(choices)]
        answer = self._head(self.whole_kind) | (self._prompt_ids(0) if self.has_one_prompt else {})
        return AnswerResponse(answer | {"choices": choices, "usage": shapes.usage(results, self.prompts)})

    def choice(
        self,
        index: int,
        content: dict[str, Any],
        *,
        ids: Sequence[int] = (),
        logprobs: dict[str, Any] | None = None,
        result: Result | None = None,
    ) -> dict[str, Any]:
        """A choice with its content and the ids of its text; `result` is the answer, if this completes it."""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}
        choice |= content
        if self.fields.return_token_ids:
            choice["token_ids"] = list(ids)
        if result is not None:
            choice |= {"finish_reason": result.finish_reason, "stop_reason": result.stop_reason}
            if self.fields.multiverse is not None:
                choice["multiverse"] = shapes.multiverse(result, tree=self.fields.ours.return_tree)
        return choice

    async def _events(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        head = self._head(self.chunk_kind)
        results = []
        told = 0
        for index in range(len(batch.generations)):  # choices open in the order of their index
            choice, ids = await self.opening(index), self._prompt_ids(index)
            opened = ids | {"choices": [choice]} if self.has_one_prompt else {"choices": [choice | ids]}
            yield event(head | opened | self._usage_so_far(0))
        async for piece in pieces(self.request, batch, self.fields, in_thought=self.in_thought):
            if piece is None:
                yield PING
                continue
            told += len(piece.tokens)
            for choice in self.deltas(piece):
                yield event(head | {"choices": [choice]} | self._usage_so_far(told))
            if piece.result is not None:
                results.append(piece.result)
        if self.fields.wants_usage:
            yield event(head | {"choices": [], "usage": shapes.usage(results, self.prompts)})
        yield DONE

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        """What is told of the prompt of a choice beside its text."""
        if not self.fields.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.prompts[index // self.fields.count])}

    def _usage_so_far(self, tokens: int) -> dict[str, Any]:
        """What a chunk says of it, once so many tokens of the answers have been told."""
        if not self.fields.wants_usage:
            return {}
        return {"usage": shapes.usage_so_far(self.prompts, tokens) if self.fields.wants_running_usage else None}

    def _head(self, kind: str) -> dict[str, Any]:
        return shapes.head(self.id_prefix, kind, self.model.name)
