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
from megatron_multiverse.inference.branch import Branch, Status
from megatron_multiverse.inference.context import Row
from megatron_multiverse.inference.request import RequestState, TokenCallback
from megatron_multiverse.inference.result import FinishReason, Request, Result
from megatron_multiverse.inference.runner import Runner
from megatron_multiverse.inference.sampler import CounterSampler, Sampler
from megatron_multiverse.inference.scheduler import Scheduler
from megatron_multiverse.structure import Event, StructureMachine, StructureVocab


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
            on_start=self._on_start,
            prefix_pages=prefix_pages,
        )
        self.num_steps = 0
        self._next_id = 0
        self._cancelled: set[int] = set()

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

    def add_request(self, request: Request, *, on_token: TokenCallback | None = None) -> int:
        """Queue a request; returns its id.

        Raises:
            GenerationError: see `check`.
        """
        self.check(request)
        state = RequestState(self._next_id, request, self.max_position, on_token)
        self._next_id += 1
        state.start(self._machine())
        self.scheduler.waiting.append(state)
        return state.request_id

    def cancel(self, request_id: int) -> None:
        """End a request and everything it forked; the next `step` returns its result. Unknown ids are ignored."""
        self._cancelled.add(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.scheduler.active or self.scheduler.waiting)

    def generate(self, requests: Sequence[Request], *, on_token: TokenCallback | None = None) -> list[Result]:
        """Serve requests to the end; results in their order.

        Args:
            requests: any number; those that do not fit at once wait.
            on_token: called with (index of the request, branch name, ids) as branches write.

        Raises:
            GenerationError: a request can never be served (see `check`); none is started then.
        """
        for request in requests:
            self.check(request)
        first = self._next_id

        def renumber(request_id: int, branch: str, ids: list[int]) -> None:
            assert on_token is not None
            on_token(request_id - first, branch, ids)

        for request in requests:
            self.add_request(request, on_token=None if on_token is None else renumber)
        results: dict[int, Result] = {}
        while len(results) < len(requests):
            for result in self.step():
                if result.request_id >= first:
                    results[result.request_id] = result
        return [results[first + k] for k in range(len(requests))]

    # -- one step ----------------------------------------------------------------------------------------------

    def step(self) -> list[Result]:
        """Advance every branch that can run by one token; returns the requests that finished."""
        done = self._drop_cancelled()
        rows = self._plan(done)
        if not rows:
            return done
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
        done += self._collect() + self._drop_cancelled()
        if self.debug:
            self.scheduler.check_integrity()
        return done

    def _take(self, logits: Tensor, branches: list[Branch]) -> None:
        with torch.inference_mode():
            logits = logits[:, : self.vocab_size]
            tokens = self.sampler(logits, branches)
            finite = torch.isfinite(logits.gather(1, tokens[:, None])[:, 0])
        for branch, token, good in zip(branches, tokens.tolist(), finite.tolist(), strict=True):
            if branch.request.finish_reason is not None:
                continue  # a sibling failed in this step
            if good:
                self._commit(branch, token)
            else:
                branch.request.error = "the model returned logits that are not finite"
                branch.request.close_all("error")

    def _plan(self, done: list[Result]) -> list[Row]:
        while True:
            rows = self.scheduler.plan()
            if rows:
                return rows
            released = self.scheduler.settle()
            finished = self._collect()
            done += finished
            if released or finished:
                continue
            if not self.scheduler.active:
                return rows
            if not self.scheduler.prefixes.clear():
                self._relieve()

    def _relieve(self) -> None:
        """No branch can get a page: the newest request steps back, the last one ends."""
        newest = self.scheduler.active[-1]
        if len(self.scheduler.active) > 1:
            self.scheduler.preempt(newest)
            newest.start(self._machine())
            self.scheduler.waiting.appendleft(newest)
            return
        newest.error = (
            f"the cache is full: {self.pool.num_pages} pages of {self.pool.page_size} tokens do not hold all branches; "
            "raise num_pages"
        )
        newest.counts["out_of_pages"] += 1
        newest.close_all("length")

    def _collect(self) -> list[Result]:
        """Results of requests whose root has ended; their pages come free."""
        results = []
        for state in list(self.scheduler.active):
            finish = state.root.finish
            if finish is not None:
                if state.finish_reason is None:
                    state.finish_reason = "length" if finish == "length" else "stop"
                results.append(self._remove(state, state.finish_reason))
        return results

    def _drop_cancelled(self) -> list[Result]:
        if not self._cancelled:
            return []
        results = []
        for state in [*self.scheduler.active, *self.scheduler.waiting]:
            if state.request_id in self._cancelled:
                state.close_all("abort")
                results.append(self._remove(state, "abort"))
        self._cancelled.clear()
        return results

    def _remove(self, state: RequestState, reason: FinishReason) -> Result:
        state.finish_reason = reason
        self.scheduler.remove(state)
        return state.result()

    # -- what a token does -------------------------------------------------------------------------------------

    def _machine(self) -> StructureMachine:
        return StructureMachine(self.vocab, max_depth=self.max_depth, max_paths=self.max_paths)

    def _on_start(self, branch: Branch) -> None:
        """A branch begins or resumes: end it if its budget is spent, replay what it wrote before a preemption."""
        if branch.exhausted():
            branch.close("length")
        while branch.status is Status.RUNNING:
            token = branch.request.replay_token(branch)
            if token is None:
                return
            self._commit(branch, token)

    def _commit(self, branch: Branch, token: int) -> None:
        """Take a sampled token: text, a fork, the end of a path or of the answer."""
        params = branch.request.params
        recorded = branch.request.history[branch.path]
        if branch.num_sampled == len(recorded):
            recorded.append(token)
        branch.num_sampled += 1
        stops = token == self.vocab.eos_id and not params.ignore_eos
        if stops or (branch.parent is None and token in params.stop_token_ids):
            branch.close("eos")
        elif not branch.fits(token):
            branch.close("length")
        else:
            event = branch.write([token])
            if event is Event.FORK:
                if not branch.fork():
                    branch.request.counts["fork_refused"] += 1
                    branch.close("length")
            elif event is Event.PATH_END:
                branch.end("path_end")
            elif branch.exhausted():
                branch.close("length")


def _advances(row: Row) -> bool:
    """Whether the row is more than a middle piece of a prompt."""
    return row.sample or bool(row.branch.ids)
