"""The engine: requests in, answers out, parallel blocks decoded in parallel (arXiv 2506.09991, section 5.2).

`</Goal>` forks the branch that wrote it, `</Path>` ends a path, and when all paths of a block ended their pages are
joined without computing anything again. Whatever the model writes, a request ends, with its structure closed and
within its budget, and gives everything back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from megatron_multiverse.config.engine import EngineConfig
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.cache.book import PageBook
from megatron_multiverse.inference.draft import Step
from megatron_multiverse.inference.preemption import recover, relieve, restart
from megatron_multiverse.inference.scheduler import Scheduler
from megatron_multiverse.inference.step.plan import StepOutput
from megatron_multiverse.inference.step.runner import PendingOutput, Runner
from megatron_multiverse.inference.step.sampler import Sampler
from megatron_multiverse.inference.text.answer import make_result
from megatron_multiverse.inference.text.commit import close_all, commit_token
from megatron_multiverse.inference.text.prompt_scores import PromptScores
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.inference.text.state import Detokenize, RequestState, TokenCallback, new_state
from megatron_multiverse.inference.width import StepLoad, StepTime
from megatron_multiverse.structure import StructureMachine, StructureVocab

logger = logging.getLogger(__name__)


class Flight(NamedTuple):
    """A step that runs."""

    step: Step
    output: PendingOutput
    start: float
    """When its planning began."""


class Engine:
    """Serves requests over one model.

    Args:
        model: megatron-core's GPTModel as `model.build_gpt_model` makes it (or anything `Runner` accepts).
        structure_vocab: the ids of tags, newline and labels.
        config: sizes and limits; `num_pages` 0 takes enough for eight sequences of the model's full length.
        max_position: positions the model can take; by default what the model says.
        vocab_size: ids of the tokenizer; the padding of the output layer above it is never chosen.
        sampler: chooses tokens; by default `CounterSampler`.
        clock: seconds, to measure steps by.
        detokenize: ids -> text, tags kept; needed by requests that say something about text, such as stop texts.
    """

    def __init__(
        self,
        model: nn.Module,
        structure_vocab: StructureVocab,
        config: EngineConfig | None = None,
        *,
        max_position: int | None = None,
        vocab_size: int | None = None,
        sampler: Sampler | None = None,
        clock: Callable[[], float] = time.perf_counter,
        detokenize: Detokenize | None = None,
    ) -> None:
        self.detokenize = detokenize
        self.config = config = config or EngineConfig()
        self.vocab = structure_vocab
        own_limit = getattr(model, "max_sequence_length", None)
        num_pages = config.num_pages or pages_for(max_position or own_limit or 4096, config)
        self.max_position = max_position or own_limit or config.page_size * num_pages
        self.book = PageBook(num_pages, config.page_size, remember_freed=config.debug)
        self.runner = Runner(
            model,
            num_pages=num_pages,
            page_size=config.page_size,
            vocab_size=vocab_size,
            sampler=sampler,
            cuda_graphs=config.cuda_graphs,
        )
        target = None if config.token_latency_target_ms is None else config.token_latency_target_ms / 1000
        self.step_time = None if target is None else StepTime()
        self.scheduler = Scheduler(
            self.book,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            prefix_cache=config.prefix_cache,
            step_time=self.step_time,
            latency_target=target,
        )
        self.overlap = self.runner.graphs is not None if config.overlap is None else config.overlap
        self._clock = clock
        self._last_output = -float("inf")  # when the last step's tokens came
        self._flight: Flight | None = None
        self.num_steps = 0
        self.weight_version = 0
        self._next_id = 0
        self._cancelled: set[int] = set()
        self._finished: list[Result] = []
        self._stepping = False
        rows = getattr(model, "vocab_size", None)
        if vocab_size is not None and rows is not None and vocab_size > rows:
            raise GenerationError(
                f"the tokenizer has {vocab_size} ids, the model {rows} rows of embeddings; "
                "use the tokenizer of the model"
            )
        self._num_ids: int | None = vocab_size if vocab_size is not None else rows

    def close(self) -> None:
        """Let go of the model, which stays usable for anything else; the ranks that follow this one stop."""
        self.runner.close()

    def check(self, request: Request) -> None:
        """Refuse a request that could never be served.

        Raises:
            GenerationError: naming the numbers.
        """
        prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        capacity = self.book.num_pages * self.book.page_size
        if prompt + max_tokens > capacity:
            raise GenerationError(
                f"prompt ({prompt} tokens) and max_tokens ({max_tokens}) need {prompt + max_tokens} "
                f"cache slots, the engine has {capacity} ({self.book.num_pages} pages of {self.book.page_size}); "
                "lower max_tokens or raise num_pages"
            )
        if prompt >= self.max_position:
            raise GenerationError(
                f"prompt ({prompt} tokens) leaves no room in the {self.max_position} positions of the model; "
                "shorten the prompt"
            )
        sampling = request.sampling
        if (sampling.stop or sampling.commit_on or request.accept) and self.detokenize is None:
            raise GenerationError(
                "stop, commit_on and accept read text, which needs the tokenizer: Engine(..., detokenize=...)"
            )
        # On a GPU an id outside of the embedding is not an exception but the end of the process.
        for index, token in enumerate(request.prompt_ids):
            self._check_id(f"prompt token {index}", token)
        for token in request.sampling.logit_bias:
            self._check_id("an id of logit_bias", token)
        for token in request.sampling.stop_token_ids:
            self._check_id("a stop token", token)
            if token in self.vocab.tag_of:
                raise GenerationError(
                    f"stop token {token} is the structure tag {self.vocab.tag_of[token].text}, which the engine reads "
                    "itself; leave it out (max_depth 0 in EngineConfig keeps answers from forking)"
                )

    def _check_id(self, what: str, token: int) -> None:
        limit = self._num_ids
        if token < 0 or (limit is not None and token >= limit):
            allowed = f"0 to {limit - 1}" if limit is not None else "0 and up"
            raise GenerationError(
                f"{what} is {token}, the ids of the vocabulary are {allowed}; use the tokenizer of the model"
            )

    def add_request(self, request: Request, *, on_token: TokenCallback | None = None) -> int:
        """Queue a request; returns its id.

        A request for n answers takes n ids, the one returned and those that follow. Each gives a result of its own;
        their samples are `request.sample`, `request.sample` + 1, ...

        Raises:
            GenerationError: see `check`.
        """
        self.check(request)
        first, sampling, config = self._next_id, request.sampling, self.config
        scores = None if sampling.prompt_logprobs is None else PromptScores(first, len(request.prompt_ids))
        for k in range(sampling.n):
            machine = StructureMachine(
                self.vocab,
                max_depth=smaller(config.max_depth, sampling.max_depth),
                max_paths=smaller(config.max_paths, sampling.max_paths),
            )
            answer = dataclasses.replace(request, sample=request.sample + k) if k else request
            state = new_state(first + k, answer, machine, self.max_position, on_token, self.detokenize)
            state.scores = scores
            state.use_weights(self.weight_version)
            self.scheduler.waiting.append(state)
        self._next_id += sampling.n
        return first

    def cancel(self, request_id: int) -> None:
        """End a request and everything it forked; the next `step` returns its result. Unknown ids are ignored."""
        if request_id < self._next_id:
            self._cancelled.add(request_id)

    def take_cancelled(self) -> list[Result]:
        """The results of requests that were cancelled, and of those that have ended, without a step."""
        with self._guard():
            self._end_cancelled()
        done, self._finished = self._finished, []
        return done

    def use_weights(self, version: int) -> None:
        """The model's weights have been changed in place (`model.weights.copy_weights`, an optimizer's step).

        Nothing computed with the old ones is read again: the prefix cache is emptied, and answers in work go on from
        the text they have, whose keys are computed afresh. Each token of a result names the version that wrote it.

        Args:
            version: what the new weights are called in results.

        Raises:
            GenerationError: called from within a step.
        """
        with self._guard():
            flight, self._flight = self._flight, None
            self.scheduler.in_flight = False
            if flight is not None:
                self._land(flight)  # it was launched before the change
                self._hand_out()
            restart(self.scheduler)
            self.weight_version = version
            for state in self._states():
                state.use_weights(version)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to hand out."""
        return bool(self.scheduler.active or self.scheduler.waiting or self._finished)

    def generate(self, requests: Sequence[Request], *, on_token: TokenCallback | None = None) -> list[Result]:
        """Serve requests to the end; results in their order, one for each of a request's n answers.

        Requests added by others are served along; their results wait for the next `step`.

        Args:
            requests: any number; those that do not fit at once wait.
            on_token: called with (index of the result, branch name, ids) as branches write.

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
            first = self.add_request(request, on_token=None if on_token is None else renumber)
            index |= {first + k: len(index) + k for k in range(request.sampling.n)}
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

    def step(self) -> list[Result]:
        """Advance every branch that can run by one token; returns the requests that finished.

        Raises:
            GenerationError: called from within a step (by an `on_token`).
            Exception: what the model or the sampler raised. The engine stays whole: the active requests start again
                in the next step, and after `preemption.MAX_FAILURES` such steps without a token end with `error`.
        """
        with self._guard():
            self._end_cancelled()
            start = self._clock()
            step = self._plan()
            flight, self._flight = self._flight, None
            if step is not None:
                self._flight = Flight(step, self.runner.launch(step.plan), start)
            if not self.overlap:
                flight, self._flight = self._flight, None
            if flight is not None:
                self._land(flight)
            self.scheduler.in_flight = self._flight is not None
            self._hand_out()
            self._end_cancelled()
            if self.config.debug:
                self.scheduler.check_integrity()
        done, self._finished = self._finished, []
        return done

    def _plan(self) -> Step | None:
        """The next step; where nothing can run, the tokens in flight may change that, then requests step back."""
        while (step := self.scheduler.plan()) is None and self.scheduler.active:
            if self._flight is not None:
                flight, self._flight = self._flight, None
                self.scheduler.in_flight = False
                self._land(flight)
            else:
                relieve(self.scheduler)
            self._hand_out()
        return step

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """One step at a time, and an engine that is whole after one that fails."""
        if self._stepping:
            raise GenerationError("step was called from within a step; on_token may add and cancel requests only")
        self._stepping = True
        try:
            yield
        except BaseException as error:
            self._flight = None
            for state in recover(self.scheduler, error):
                self._finish(state)
            raise
        finally:
            self._stepping = False

    def _land(self, flight: Flight) -> None:
        """Wait for the tokens of a step and take them; how long everyone waited tells how wide steps may be."""
        output = flight.output.wait()
        now = self._clock()
        if self.step_time is not None:
            plan = flight.step.plan
            rows = len(plan.lengths)
            load = StepLoad(rows, int(plan.lengths.sum()), len(plan.ids) - rows)
            self.step_time.observe(load, now - max(flight.start, self._last_output))
        self._last_output = now
        self._commit(flight.step, output)

    def _commit(self, step: Step, output: StepOutput) -> None:
        """Give every sampled row its token; `text/commit.py` writes all that follows from it."""
        self.num_steps += 1
        served: dict[int, RequestState] = {}
        self._score(step, output)
        tokens, logprobs, finite = (array.tolist() for array in output[:3])
        for row, (sampled, token, logprob, good) in enumerate(zip(step.sampled, tokens, logprobs, finite, strict=True)):
            state = sampled.state
            if state.finish_reason is not None or not self.scheduler.is_wanted(sampled):
                continue  # a sibling failed in this step, or the token before this one changed what comes next
            served[id(state)] = state
            if good:
                commit_token(state, sampled.branch, token, logprob, output.top(row, state.request.sampling.logprobs))
                if state.cuts:
                    self.scheduler.take_back(state)
                self.scheduler.check_fed(sampled, token)
                if state.error:
                    close_all(state, "error")
            else:
                state.error = "the model returned logits that are not finite"
                self.scheduler.distrust(state)
                close_all(state, "error")
        for state in served.values():
            state.decode_steps += 1
            state.failures = 0  # not after a step that only feeds again what the failed ones lost
        for state in self.scheduler.active:
            state.step += 1

    def _score(self, step: Step, output: StepOutput) -> None:
        """Keep the log-probabilities of prompts."""
        start = 0
        for state, _, first, count in step.scored:
            end, top = start + count, state.request.sampling.prompt_logprobs or 0
            if state.scores is not None:
                tops = [output.score_top(index, top) for index in range(start, end)]
                state.scores.put(first + 1, output.scores[start:end].tolist(), tops)
            start = end

    def _hand_out(self) -> None:
        """Tell the callbacks what was written, and take out the requests whose answers are complete."""
        for state in list(self.scheduler.active):
            if state.unheard and not self._tell(state) and state.finish_reason is None:
                close_all(state, "error")
            finish = state.root.finish
            if finish is not None:
                state.finish_reason = state.finish_reason or ("length" if finish == "length" else "stop")
                self.scheduler.remove(state)
                self._finish(state)

    def _end_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, set()
        try:
            for state in self._states() if cancelled else ():
                if state.request_id in cancelled:
                    close_all(state, "abort")
                    self.scheduler.remove(state)
                    self._finish(state)
        except BaseException:
            self._cancelled |= cancelled  # an interrupt; those that have ended are unknown by now
            raise

    def _finish(self, state: RequestState) -> None:
        """The result is handed out by this step, or by the next if it fails."""
        try:
            self._tell(state)
        finally:
            self._finished.append(make_result(state))

    def _tell(self, state: RequestState) -> bool:
        """Hand a callback what was written since it was last called; False if it raised, which is the last call."""
        while state.unheard:
            name, ids = state.unheard.pop(0)  # an interrupt leaves the others for later
            try:
                assert state.on_token is not None
                state.on_token(state.request_id, name, ids)
            except Exception as error:
                logger.exception("on_token of request %d raised; the request ends with an error", state.request_id)
                state.on_token, state.unheard = None, []
                state.error = f"on_token raised {error!r}"
                return False
        return True

    def _states(self) -> list[RequestState]:
        return [*self.scheduler.active, *self.scheduler.waiting]


def smaller(one: int | None, other: int | None) -> int | None:
    """The smaller of two limits; None is no limit."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


def pages_for(longest: int, config: EngineConfig) -> int:
    """Pages for eight answers of `longest` tokens, prompt included, and their forks."""
    return 8 * (-(-longest // config.page_size) + 16)
