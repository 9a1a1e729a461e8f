"""A request while it is served: its root branch, and what is counted and heard on the way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_multiverse.config.sampling import SamplingParams
from megatron_multiverse.inference.text.branch import Branch, Budget, Cut, branch_key
from megatron_multiverse.inference.text.budget import whole_budget
from megatron_multiverse.inference.text.counts import TokenCounts
from megatron_multiverse.inference.text.guide import Guide
from megatron_multiverse.inference.text.prompt_scores import PromptScores
from megatron_multiverse.inference.text.replay import replay_answers
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import FinishReason, StopMatch, TimelineSpan, TopLogprobs
from megatron_multiverse.inference.text.scanner import StopScanner
from megatron_multiverse.structure import StructureMachine

logger = logging.getLogger(__name__)

Detokenize = Callable[[list[int]], str]
"""Ids to text, tags kept (`MultiverseTokenizer.detokenize`)."""


class Written(list[int]):
    """Ids that a branch wrote at once: one that was drawn, with its log-probability, or some that were forced."""

    logprob: float | None = None
    """None where they were forced."""
    top: TopLogprobs | None = None
    """The most likely tokens beside it, where the request asks for them."""
    stop: StopMatch | None = None
    """Where these close a branch that ended at a stop text: that text, by tokens of the branch."""

    @classmethod
    def drawn(cls, token: int, logprob: float, top: TopLogprobs | None) -> Written:
        """One token that was drawn."""
        written = cls((token,))
        written.logprob, written.top = logprob, top
        return written

    @classmethod
    def forced(cls, ids: Sequence[int], stop: StopMatch | None) -> Written:
        """Tokens that nobody drew."""
        written = cls(ids)
        written.stop = stop
        return written


TokenCallback = Callable[[int, str, Written], None]
"""Called with (request id, branch name, ids) for everything a branch writes, forced tokens included, once the step
that wrote it is complete. If it raises, its request ends with `error`; it may add and cancel requests, not step the
engine."""


@dataclass(eq=False)
class RequestState:
    """One request being served. Its text stays when its cache is taken away; it is fed again then."""

    request_id: int
    request: Request
    root: Branch
    on_token: TokenCallback | None = None
    detokenize: Detokenize | None = None
    """Needed where the request asks for something about text."""
    path_end_ids: frozenset[int] = frozenset()
    """`Branch.end_ids` of its paths."""
    scores: PromptScores | None = None
    """Log-probabilities of the prompt, where the request asks for them; all answers to it have the same ones."""
    unheard: list[tuple[str, Written]] = field(default_factory=list)
    """(branch name, ids) written since `on_token` was last called."""
    live: list[Branch] = field(default_factory=list)
    """Branches with a place in the cache and something left to do, in the order in which they started."""
    weight_version: int = 0
    """Version of the weights that its next tokens are drawn with."""
    step: int = 0
    """Steps in which the request was active."""
    decode_steps: int = 0
    """Steps that gave it a token."""
    num_blocks: int = 0
    preemptions: int = 0
    failures: int = 0
    """Steps that raised while the request was active, since it last got a token."""
    pages_wanted: int = 0
    """Free pages to wait for before a request that stepped back starts again."""
    cached_tokens: int = 0
    """Tokens of the prompt that other requests had computed when the request first started."""
    cuts: list[Cut] = field(default_factory=list)
    """Tries that were dropped, and are not yet out of the cache."""
    freed_pages: int = 0
    """Pages that came free by that."""
    counts: Counter[str] = field(default_factory=Counter)
    """What the engine did about the answer as a whole, where it broke the grammar or found no page."""
    timeline: list[TimelineSpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""

    @property
    def scores_prompt(self) -> bool:
        """Whether this answer's pass over the prompt gives the log-probabilities of the prompt."""
        return self.lacks_scores and self.scores is not None and self.scores.answers[0] == self.request_id

    @property
    def awaits_scores(self) -> bool:
        """Whether another answer's pass over the prompt still has to give the log-probabilities of the prompt: this one
        could end before that one has."""
        return self.lacks_scores and not self.scores_prompt

    @property
    def lacks_scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to come."""
        return self.scores is not None and not self.scores.complete

    def new_scanner(self) -> StopScanner | None:
        """What looks for stop texts in a branch; None if there are none."""
        sampling = self.request.sampling
        if not sampling.stop:
            return None
        assert self.detokenize is not None
        return StopScanner(sampling.stop, self.detokenize, include=sampling.include_stop)

    def keeps_nothing_beside(self, branch: Branch) -> bool:
        """See `Branch.is_bare`."""
        asks = (
            branch.scanner is not None
            or branch.top_logprobs is not None
            or branch.seen is not None
            or branch.guide is not None
        )
        return not (asks or self.request.sampling.commit_after)

    def branches(self) -> Iterator[Branch]:
        """Every branch, waiting and ended ones included."""
        stack = [self.root]
        while stack:
            branch = stack.pop()
            yield branch
            stack.extend(kid for block in branch.blocks for kid in block.kids)

    def end_span(self, branch: Branch, end: int) -> None:
        """A branch takes tokens no more: the timeline shows it up to step `end`, which is not part of it."""
        if branch.span_start is not None:
            start, tokens = branch.span_start
            branch.span_start = None
            if end > start:
                span = TimelineSpan(branch.name, branch.block, start, end, len(branch.ids) - tokens)
                self.timeline.append(span)

    def use_weights(self, version: int) -> None:
        """Tokens written from now on are drawn with weights of this version."""
        self.weight_version = version
        for branch in self.branches():
            branch.versions.append((len(branch.ids), version))

    def tell(self) -> bool:
        """Hand the callback what was written since it was last called; False if it raised, which is the last call."""
        while self.unheard:
            name, ids = self.unheard.pop(0)  # an interrupt leaves the others for later
            try:
                assert self.on_token is not None
                self.on_token(self.request_id, name, ids)
            except Exception as error:
                logger.exception("on_token of request %d raised; the request ends with an error", self.request_id)
                self.on_token, self.unheard = None, []
                self.error = f"on_token raised {error!r}"
                return False
        return True

    def forget_cache(self) -> None:
        """Nothing of the request is in the cache any more; its text stays."""
        for branch in self.branches():
            branch.fed = branch.num_joined = 0
            self.end_span(branch, self.step)
            for block in branch.blocks:
                block.started = 0
        self.live, self.cuts = [], []


def new_state(
    request_id: int,
    request: Request,
    machine: StructureMachine,
    max_position: int,
    on_token: TokenCallback | None = None,
    detokenize: Detokenize | None = None,
    guide: Guide | None = None,
) -> RequestState:
    """The state of a request of which nothing is written yet.

    Args:
        request_id: number of the request.
        request: what was asked for.
        machine: a fresh grammar.
        max_position: positions the model can take.
        on_token: hears what is written.
        detokenize: needed for stop texts.
        guide: holds the answer to its grammar.
    """
    prompt, sampling, eos_id = request.prompt_ids, request.sampling, machine.vocab.eos_id
    eos = end_ids(sampling, eos_id, paths=True)
    root = Branch(
        machine=machine,
        next_position=0,
        budget=Budget(0, 0),
        key=branch_key(sampling.seed, request.sample, ()),
        end_ids=end_ids(sampling, eos_id),
        seen=TokenCounts(list(prompt)) if sampling.has_penalties else None,
        guide=guide,
        leaves_open=sampling.leave_open,
    )
    replay_answers(root, prompt, request.replay_structure)
    root.top_logprobs = [None] * len(root.ids) if sampling.logprobs else None
    root.budget = whole_budget(sampling, root.next_position, max_position)
    root.count_room()
    state = RequestState(request_id, request, root, on_token, detokenize)
    state.path_end_ids = root.end_ids if sampling.stop_in_branches else eos
    root.scanner = state.new_scanner()
    if root.scanner is not None:
        root.scanner.begin(len(root.ids))
    root.is_bare = state.keeps_nothing_beside(root)
    return state


def end_ids(sampling: SamplingParams, eos_id: int | None, *, paths: bool = False) -> frozenset[int]:
    """Ids that end an answer when they are drawn outside of its paths; `paths`: those that end a path, too."""
    eos = frozenset(() if eos_id is None or sampling.ignore_eos else (eos_id,))
    return eos if paths else eos | frozenset(sampling.stop_token_ids)
