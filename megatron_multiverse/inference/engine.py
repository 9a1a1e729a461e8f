"""The engine: requests in, answers out, parallel blocks decoded in parallel (arXiv 2506.09991, section 5.2).

`</Goal>` forks the branch that wrote it, `</Path>` ends a path, and when all paths of a block ended their pages are
joined without computing anything again. Whatever the model writes, a request ends, with its structure closed and
within its budget, and gives everything back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from megatron_multiverse.config.engine import EngineConfig
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.cache.book import PageBook
from megatron_multiverse.inference.draft import Step
from megatron_multiverse.inference.intake import Intake, count_ids
from megatron_multiverse.inference.preemption import recover, relieve, restart
from megatron_multiverse.inference.sampling_plan import keep_scores
from megatron_multiverse.inference.scheduler import Scheduler
from megatron_multiverse.inference.step.runner import PendingOutput, Runner
from megatron_multiverse.inference.step.sampler import Sampler
from megatron_multiverse.inference.text.answer import make_result
from megatron_multiverse.inference.text.commit import begin_answer, close_all, commit_text, commit_token, foresee_fork
from megatron_multiverse.inference.text.guide import Grammars
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.inference.text.state import Detokenize, RequestState, TokenCallback, Written
from megatron_multiverse.inference.turns import Turns
from megatron_multiverse.inference.width import StepLoad, StepTime
from megatron_multiverse.structure import StructureVocab


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
        grammars: for the model's tokenizer; needed by requests with a grammar.
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
        grammars: Grammars | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        own_limit = getattr(model, "max_sequence_length", None)
        num_pages = config.num_pages or config.pages_for(max_position or own_limit or 4096)
        self.max_position = max_position or own_limit or config.page_size * num_pages
        self.intake = Intake(
            structure_vocab,
            config,
            num_pages=num_pages,
            max_position=self.max_position,
            num_ids=count_ids(vocab_size, getattr(model, "vocab_size", None)),
            detokenize=detokenize,
            grammars=grammars,
        )
        self.book = PageBook(num_pages, config.page_size, remember_freed=config.debug)
        self.runner = Runner(
            model,
            num_pages=num_pages,
            page_size=config.page_size,
            vocab_size=vocab_size,
            sampler=sampler,
            cuda_graphs=config.cuda_graphs,
            round_as_trained=config.round_as_trained,
            quantization=config.quantization,
        )
        target = None if config.token_latency_target_ms is None else config.token_latency_target_ms / 1000
        self.scheduler = Scheduler(
            self.book,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            prefix_cache=config.prefix_cache,
            step_time=None if target is None else StepTime(),
            latency_target=target,
        )
        self.overlap = self.runner.graphs is not None if config.overlap is None else config.overlap
        self._turns = Turns(structure_vocab, detokenize)
        self._clock = clock
        self._last_output = -float("inf")  # when the last step's tokens came
        self._flight: Flight | None = None
        self.num_steps = 0
        self.fed_tokens = 0
        """Tokens that steps have brought, fed again ones included."""
        self.copied_tokens = 0
        """Slots that forks and joins have copied."""
        self.weight_version = 0
        self._cancelled: set[int] = set()
        self._finished: list[Result] = []
        self._stepping = False
        self._is_whole = True
        """False within a step, and after one that failed until everything has been set back."""

    def close(self) -> None:
        """Let go of the model, which stays usable for anything else; the ranks that follow this one stop."""
        self.runner.close()

    def check(self, request: Request) -> None:
        """Refuse a request that could never be served.

        Raises:
            GenerationError: naming the numbers.
        """
        self.intake.check(request)

    def add_request(self, request: Request, *, on_token: TokenCallback | None = None) -> int:
        """Queue a request; returns its id.

        A request for n answers takes n ids, the one returned and those that follow. Each gives a result of its own;
        their samples are `request.sample`, `request.sample` + 1, ...

        Raises:
            GenerationError: see `check`.
        """
        states = self.intake.take(request, on_token)
        for state in states:
            state.use_weights(self.weight_version)
            begin_answer(state)
        for state in states:
            self.scheduler.queue(state)
        return states[0].request_id

    def cancel(self, request_id: int) -> None:
        """End a request and everything it forked; the next `step` returns its result. Unknown ids are ignored."""
        if request_id < self.intake.next_id:
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
            self._land_early()  # what runs was launched before the change
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

        def renumber(request_id: int, branch: str, ids: Written) -> None:
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
            coming = self._next_step()
            landing, self._flight = self._flight, None  # the step before, if its tokens are still to come
            if coming is not None:
                step, launch = coming
                self._flight = Flight(step, launch(), start)
                self.scheduler.let_go()
            if not self.overlap:  # nothing was in flight: wait for this one
                landing, self._flight = self._flight, None
            if landing is not None:
                self._land(landing)
            self.scheduler.in_flight = None if self._flight is None else self._flight.step
            self._hand_out()
            self._end_cancelled()
        done, self._finished = self._finished, []
        return done

    def _next_step(self) -> tuple[Step, Callable[[], PendingOutput]] | None:
        """The next step and what launches it. If the tokens in flight may fork or join a block, it waits for them, and
        if they do, it is planned after they are written; so it is where they say what a grammar allows next."""
        if self._flight is not None and any(guide.holds for guide in self._flight.step.guides):
            self._land_early()
        scheduler, flight = self.scheduler, self._flight
        step = scheduler.go_on()
        if flight is not None and self._turns.may_come(flight.step, len(scheduler.active)):
            launch = None if step is None else partial(self.runner.launch, step.plan, self.runner.prepare(step.plan))
            for state, branch, _ in flight.step.sampled:
                if branch.machine.may_fork:
                    foresee_fork(state, branch)
            if step is not None and launch is not None:
                tokens = flight.output.wait().tokens.tolist()
                if not self._turns.came(flight.step, tokens, len(scheduler.active)):
                    return step, launch
                scheduler.withdraw(step)
                step = None
            self._land_early()
        step = step or scheduler.plan() or self._make_room()
        return None if step is None else (step, partial(self.runner.launch, step.plan))

    def _make_room(self) -> Step | None:
        """A step where nothing could run: the tokens in flight may change that, then requests step back."""
        step = None
        while step is None and self.scheduler.active:
            if not self._land_early():
                relieve(self.scheduler)
                self._hand_out()
            step = self.scheduler.plan()
        return step

    def _land_early(self) -> bool:
        """Take the tokens in flight before the next step is planned; whether there were any."""
        flight, self._flight = self._flight, None
        self.scheduler.in_flight = None
        if flight is None:
            return False
        self._land(flight)
        self._hand_out()
        return True

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """One step at a time, and an engine that is whole after one that fails."""
        if self._stepping:
            raise GenerationError("step was called from within a step; on_token may add and cancel requests only")
        self._stepping = True
        try:
            if not self._is_whole:  # an interrupt came while an earlier step was set back
                recover(self.scheduler, KeyboardInterrupt())
            self._is_whole = False
            yield
            if self.config.debug:
                self.scheduler.places.check_integrity()
            self._is_whole = True
        except BaseException as error:
            self._flight = None
            for state in recover(self.scheduler, error):
                self._finish(state)
            self._is_whole = True
            raise
        finally:
            self._stepping = False

    def _land(self, flight: Flight) -> None:
        """Wait for the tokens of a step and give each to its branch; `text/commit.py` writes all that follows."""
        output = flight.output.wait()
        self._note_step(flight)
        self.num_steps += 1
        scheduler, step = self.scheduler, flight.step
        if step.scored:
            keep_scores(step.scored, output)
        served: dict[RequestState, None] = {}
        shaping = step.plan.sampling.shaping
        held = frozenset() if shaping is None else frozenset(shaping.guided.tolist())
        drawn = zip(step.sampled, *(array.tolist() for array in output[:3]), strict=True)
        for row, (sampled, token, logprob, is_finite) in enumerate(drawn):
            state, branch, length = sampled
            if is_finite and commit_text(state, branch, length, token, logprob):
                served[state] = None
                continue
            if not branch.goes_on_after(length):
                continue  # a sibling failed in this step, or the token before this one changed what comes next
            if branch.guide is not None and branch.guide.holds and row not in held:
                scheduler.feed_again(sampled)  # the token before this one ended the thought
                continue
            served[state] = None
            if is_finite:
                wants_top = branch.top_logprobs is not None
                top = output.top(row, state.request.sampling.logprobs) if wants_top else None
                commit_token(state, branch, token, logprob, top)
                if state.cuts:
                    scheduler.drop_tries(state)
                if branch.fed > length:
                    scheduler.take_back(sampled, token)
            else:
                state.error = "the model returned logits that are not finite"
                scheduler.places.distrust(state)
            if state.error:
                close_all(state, "error")
        for state in served:
            state.decode_steps += 1
            state.failures = 0  # not after a step that only feeds again what the failed ones lost
        for state in scheduler.active:
            state.step += 1

    def _note_step(self, flight: Flight) -> None:
        """Count what a step did. How long everyone waited for it tells how wide steps may be."""
        now, plan = self._clock(), flight.step.plan
        self.fed_tokens += len(plan.ids)
        # Slots that receive what another slot holds, or what another slot receives in this step.
        self.copied_tokens += len(plan.copies) + len(plan.write_slots) - len(plan.ids)
        if self.scheduler.step_time is not None:
            rows = len(plan.lengths)
            load = StepLoad(rows, int(plan.lengths.sum()), len(plan.ids) - rows)
            self.scheduler.step_time.observe(load, now - max(flight.start, self._last_output))
        self._last_output = now

    def _hand_out(self) -> None:
        """Tell the callbacks what was written, and take out the requests whose answers are complete."""
        for state in list(self.scheduler.active):
            if state.unheard and not state.tell() and state.finish_reason is None:
                close_all(state, "error")
            finish = state.root.finish
            # `answer_start` can be the whole answer, which is complete before its prompt is read.
            if finish is not None and not (state.finish_reason is None and state.lacks_scores):
                state.finish_reason = state.finish_reason or ("length" if finish == "length" else "stop")
                self.scheduler.remove(state)
                self._finish(state)

    def _end_cancelled(self) -> None:
        if not self._cancelled:
            return
        cancelled, self._cancelled = self._cancelled, set()
        try:
            for state in self._states():
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
            state.tell()
        finally:
            self._finished.append(make_result(state))
            if state.scores is not None:
                state.scores.leave(state.request_id)

    def _states(self) -> list[RequestState]:
        return [*self.scheduler.active, *self.scheduler.waiting]
