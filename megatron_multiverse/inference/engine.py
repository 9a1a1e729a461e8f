"""The engine: requests in, answers out, parallel blocks decoded in parallel (arXiv 2506.09991, section 5.2).

`</Goal>` forks the branch that wrote it, `</Path>` ends a path, and when all paths of a block ended their pages are
joined without computing anything again. Whatever the model writes, a request ends, with its structure closed and
within its budget, and gives everything back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.branch import Branch
from megatron_multiverse.inference.commit import commit
from megatron_multiverse.inference.context import Row
from megatron_multiverse.inference.preemption import recover, relieve
from megatron_multiverse.inference.request import Request
from megatron_multiverse.inference.request_state import RequestState, TokenCallback
from megatron_multiverse.inference.result import Result
from megatron_multiverse.inference.runner import Runner
from megatron_multiverse.inference.sampler import CounterSampler, Sampler
from megatron_multiverse.inference.scheduler import Scheduler
from megatron_multiverse.structure import StructureMachine, StructureVocab


class Engine:
    """Serves requests over one model.

    Args:
        model: megatron-core's GPTModel as `model.build_gpt_model` makes it (or anything `Runner` accepts).
        structure_vocab: the ids of tags, newline and labels.
        num_pages: pages of the cache; `page_size * num_pages` tokens in all.
        page_size: tokens per page. 1 never copies, 16 and 64 have shorter tables.
        max_rows: branches per step.
        max_step_tokens: tokens per step beyond one per row; longer prompts are fed in chunks.
        max_paths: a goal with more outlines is plain text (None: no limit).
        max_depth: deeper blocks are plain text (None: no limit).
        max_position: positions the model can take; by default what the model says.
        vocab_size: ids of the tokenizer; the padding of the output layer above it is never chosen.
        prefix_pages: pages of prompts kept for later prompts that begin alike (0: none).
        sampler: chooses tokens; by default `CounterSampler`.
        debug: poison freed pages with NaN and check the page books after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        structure_vocab: StructureVocab,
        *,
        num_pages: int,
        page_size: int = 16,
        max_rows: int = 32,
        max_step_tokens: int = 2048,
        max_paths: int | None = 64,
        max_depth: int | None = 8,
        max_position: int | None = None,
        vocab_size: int | None = None,
        prefix_pages: int = 0,
        sampler: Sampler | None = None,
        debug: bool = False,
    ) -> None:
        if max_rows < 1 or max_step_tokens < 1:
            raise GenerationError(f"max_rows ({max_rows}) and max_step_tokens ({max_step_tokens}) must be at least 1")
        self.vocab = structure_vocab
        self.max_paths, self.max_depth = max_paths, max_depth
        own_limit = getattr(model, "max_sequence_length", None)
        self.max_position = max_position or own_limit or page_size * num_pages
        self.vocab_size = vocab_size
        self.sampler = sampler or CounterSampler()
        self.debug = debug
        self.runner = Runner(model, num_pages=num_pages, page_size=page_size, debug=debug)
        self.pool = self.runner.pool
        self.scheduler = Scheduler(
            self.pool,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            prefix_pages=prefix_pages,
        )
        self.num_steps = 0
        self._next_id = 0
        self._cancelled: set[int] = set()
        self._finished: list[Result] = []
        self._stepping = False
        self._num_embeddings = vocab_size or getattr(model, "vocab_size", None)

    # -- requests ----------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Refuse a request that could never be served.

        Raises:
            GenerationError: naming the numbers.
        """
        prompt = len(request.prompt_ids)
        capacity = self.pool.num_pages * self.pool.page_size
        if prompt + request.max_tokens > capacity:
            raise GenerationError(
                f"prompt ({prompt} tokens) and max_tokens ({request.max_tokens}) need {prompt + request.max_tokens} "
                f"cache slots, the engine has {capacity} ({self.pool.num_pages} pages of {self.pool.page_size}); "
                "lower max_tokens or raise num_pages"
            )
        if prompt >= self.max_position:
            raise GenerationError(
                f"prompt ({prompt} tokens) leaves no room in the {self.max_position} positions of the model; "
                "shorten the prompt"
            )
        # On a GPU an id outside of the embedding is not an exception but the end of the process.
        limit = self._num_embeddings
        for index, token in enumerate(request.prompt_ids):
            if token < 0 or (limit is not None and token >= limit):
                allowed = f"0 to {limit - 1}" if limit is not None else "0 and up"
                raise GenerationError(
                    f"prompt token {index} is {token}, the ids of the vocabulary are {allowed}; "
                    "use the tokenizer of the model"
                )

    def add_request(self, request: Request, *, on_token: TokenCallback | None = None) -> int:
        """Queue a request; returns its id.

        Raises:
            GenerationError: see `check`.
        """
        self.check(request)
        state = RequestState(self._next_id, request, self.max_position, self._machine, on_token)
        self._next_id += 1
        self.scheduler.waiting.append(state)
        return state.request_id

    def cancel(self, request_id: int) -> None:
        """End a request and everything it forked; the next `step` returns its result. Unknown ids are ignored."""
        self._cancelled.add(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to hand out."""
        return bool(self.scheduler.active or self.scheduler.waiting or self._finished)

    def generate(self, requests: Sequence[Request], *, on_token: TokenCallback | None = None) -> list[Result]:
        """Serve requests to the end; results in their order.

        Requests added by others are served along; their results wait for the next `step`.

        Args:
            requests: any number; those that do not fit at once wait.
            on_token: called with (index of the request, branch name, ids) as branches write.

        Raises:
            GenerationError: a request can never be served (see `check`); none is started then.
            Exception: what the model raised (see `step`); the requests are taken back.
        """
        for request in requests:
            self.check(request)
        index: dict[int, int] = {}

        def renumber(request_id: int, branch: str, ids: list[int]) -> None:
            assert on_token is not None
            on_token(index[request_id], branch, ids)

        for request in requests:
            index[self.add_request(request, on_token=None if on_token is None else renumber)] = len(index)
        own: dict[int, Result] = {}
        foreign: list[Result] = []
        try:
            while len(own) < len(index):
                for result in self.step():
                    if result.request_id in index:
                        own[index[result.request_id]] = result
                    else:
                        foreign.append(result)
        except BaseException:
            for state in self._states():
                if state.request_id in index:
                    self.scheduler.remove(state)
            self._finished = [result for result in self._finished if result.request_id not in index]
            raise
        finally:
            self._finished = foreign + self._finished
        return [own[k] for k in range(len(own))]

    # -- one step ----------------------------------------------------------------------------------------------

    def step(self) -> list[Result]:
        """Advance every branch that can run by one token; returns the requests that finished.

        Raises:
            GenerationError: called from within a step (by an `on_token`).
            Exception: what the model or the sampler raised. The engine stays whole: the active requests start again
                in the next step and replay, and after `preemption.MAX_FAILURES` such steps end with `error`.
        """
        if self._stepping:
            raise GenerationError("step was called from within a step; on_token may add and cancel requests only")
        self._stepping = True
        try:
            self._step()
        except BaseException as error:
            self._finished += [state.result() for state in recover(self.scheduler, error)]
            raise
        finally:
            self._stepping = False
        done, self._finished = self._finished, []
        return done

    def _step(self) -> None:
        self._drop_cancelled()
        rows = self._plan()
        if not rows:
            return
        logits = self.runner.run(rows)
        self.scheduler.settle()
        self.num_steps += 1
        for state in {id(row.branch.request): row.branch.request for row in rows if _advances(row)}.values():
            state.decode_steps += 1
        branches = [row.branch for row in rows if row.sample]
        if branches:
            self._take(logits, branches)
        for state in self.scheduler.active:
            state.step += 1
            state.failures = 0
        self._collect()
        self._drop_cancelled()
        if self.debug:
            self.scheduler.check_integrity()

    def _take(self, logits: Tensor, branches: list[Branch]) -> None:
        with torch.inference_mode():
            logits = logits[:, : self.vocab_size]
            tokens = self.sampler(logits, branches)
            finite = torch.isfinite(logits.gather(1, tokens[:, None])[:, 0])
        for branch, token, good in zip(branches, tokens.tolist(), finite.tolist(), strict=True):
            if branch.request.finish_reason is not None:
                continue  # a sibling failed in this step
            if good:
                commit(branch, token)
            else:
                branch.request.error = "the model returned logits that are not finite"
                branch.request.close_all("error")

    def _plan(self) -> list[Row]:
        while True:
            rows = self.scheduler.plan()
            if rows:
                return rows
            released = self.scheduler.settle()
            if self._collect() or released:
                continue
            if not self.scheduler.active:
                return rows
            relieve(self.scheduler)

    # -- the end of a request ----------------------------------------------------------------------------------

    def _collect(self) -> bool:
        """Take out the requests whose root has ended or whose callback failed; whether there were any."""
        any_ended = False
        for state in list(self.scheduler.active):
            if state.callback_failed:
                state.close_all("error")
            finish = state.root.finish
            if finish is not None:
                any_ended = True
                if state.finish_reason is None:
                    state.finish_reason = "length" if finish == "length" else "stop"
                self._finish(state)
        return any_ended

    def _drop_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, set()
        for state in self._states() if cancelled else ():
            if state.request_id in cancelled:
                state.close_all("abort")
                self._finish(state)

    def _finish(self, state: RequestState) -> None:
        """Its pages come free, its result is handed out by this step."""
        self.scheduler.remove(state)
        self._finished.append(state.result())

    def _states(self) -> list[RequestState]:
        return [*self.scheduler.active, *self.scheduler.waiting]

    def _machine(self) -> StructureMachine:
        return StructureMachine(self.vocab, max_depth=self.max_depth, max_paths=self.max_paths)


def _advances(row: Row) -> bool:
    """Whether the row is more than a middle piece of a prompt."""
    return row.sample or bool(row.branch.ids)
