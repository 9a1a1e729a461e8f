"""A request while it is served."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_multiverse.inference.branch import Branch, Status
from megatron_multiverse.inference.budget import whole_budget
from megatron_multiverse.inference.fork_join import join
from megatron_multiverse.inference.request import Request
from megatron_multiverse.inference.result import BlockResult, BranchFinish, FinishReason, Result, TimelineSpan
from megatron_multiverse.structure import StructureMachine

logger = logging.getLogger(__name__)

TokenCallback = Callable[[int, str, list[int]], None]
"""Called with (request id, branch name, ids) whenever a branch writes, forced tokens included. If it
raises, its request ends with `error`; it may add and cancel requests, not step the engine."""


@dataclass(eq=False)
class RequestState:
    """See the module. A request that stepped back keeps its text until `start` makes a fresh root, which replays."""

    request_id: int
    params: Request
    max_position: int
    """Positions the model was built for."""
    make_machine: Callable[[], StructureMachine]
    """A fresh grammar for the root."""
    on_token: TokenCallback | None = None
    root: Branch = field(init=False)
    live: list[Branch] = field(default_factory=list)
    """Branches that need rows or wait for paths: everything but WAITING and ENDED."""
    step: int = 0
    """Steps since the request started."""
    num_blocks: int = 0
    decode_steps: int = 0
    preemptions: int = 0
    pages_wanted: int = 0
    """Free pages to wait for before a preempted request starts again."""
    prompt_kept: bool = False
    """Whether the prefix cache has been offered the prompt."""
    counts: Counter[str] = field(default_factory=Counter)
    timeline: list[TimelineSpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    callback_failed: bool = False
    """Whether `on_token` raised: the request ends with this step."""
    failures: int = 0
    """Steps in a row that raised while the request was active."""
    history: dict[tuple[tuple[int, int], ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    """Every sampled token by branch: what a preempted request replays instead of sampling again."""
    _announced: Counter[tuple[tuple[int, int], ...]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Make a fresh root branch that has the prompt to feed."""
        prompt = list(self.params.prompt_ids)
        self.root = Branch(
            request=self,
            machine=self.make_machine(),
            next_position=len(prompt),
            budget=whole_budget(self.params, self.max_position),
        )
        self.root.pending = prompt
        self.live = []
        self.step, self.num_blocks, self.decode_steps = 0, 0, 0
        self.counts, self.timeline = Counter(), []
        self.finish_reason, self.error = None, ""

    def announce(self, branch: Branch, ids: Sequence[int]) -> None:
        """Hand new tokens to the callback; a replay is silent.

        This is called from the middle of the engine's work, so an error of the callback is kept for the end of the
        step: half a fork would harm the other requests.
        """
        if self.on_token is None or self.callback_failed:
            return
        behind = self._announced[branch.path] - (len(branch.ids) - len(ids))
        fresh = list(ids)[max(0, behind) :]
        if fresh:
            self._announced[branch.path] += len(fresh)
            try:
                self.on_token(self.request_id, branch.name, fresh)
            except Exception as error:
                logger.exception("on_token of request %d raised; the request ends with an error", self.request_id)
                self.callback_failed = True
                self.error = f"on_token raised {error!r}"

    def replay_token(self, branch: Branch) -> int | None:
        """The recorded next token of the branch, if it has one."""
        recorded = self.history.get(branch.path, ())
        return recorded[branch.num_sampled] if branch.num_sampled < len(recorded) else None

    @property
    def prompt_fed(self) -> bool:
        """Whether the keys of the whole prompt are in the cache."""
        return self.root.node is not None and self.root.node.length >= len(self.params.prompt_ids)

    @property
    def num_rows(self) -> int:
        """Rows its branches hold."""
        return sum(needs_row(branch) for branch in self.live)

    def branches(self) -> Iterator[Branch]:
        """Every branch of the request, WAITING and ENDED ones included."""
        stack = [self.root]
        while stack:
            branch = stack.pop()
            yield branch
            stack.extend(kid for block in branch.blocks for kid in block.kids)

    def close_all(self, finish: FinishReason) -> None:
        """End every branch where it stands, balanced; the text is complete afterwards, the cache is not used."""
        reason: BranchFinish = "abort" if finish == "stop" else finish
        self._close(self.root, reason)
        self.finish_reason = finish

    def _close(self, branch: Branch, reason: BranchFinish) -> None:
        if branch.status in (Status.CLOSING, Status.ENDED):
            return
        if (block := branch.open_block) is not None:
            for kid in block.kids:
                self._close(kid, reason)
            join(branch)
        branch.close(reason)

    def result(self) -> Result:
        """The answer; every branch has ended."""
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[BlockResult] = []
        self.root.linearise(ids, positions, blocks)
        malformed = Counter(self.counts)
        self.root.count_malformed(malformed)
        assert self.finish_reason is not None
        return Result(
            request_id=self.request_id,
            token_ids=ids,
            position_ids=positions,
            blocks=blocks,
            finish_reason=self.finish_reason,
            critical_tokens=self.root.next_position - len(self.params.prompt_ids),
            decode_steps=self.decode_steps,
            malformed=malformed,
            timeline=sorted(self.timeline, key=lambda span: (span.start, span.block, span.branch)),
            preemptions=self.preemptions,
            error=self.error,
        )


def needs_row(branch: Branch) -> bool:
    """Whether the branch takes part in steps; a forked one only until its last token is fed."""
    return branch.status in (Status.RUNNING, Status.CLOSING) or (
        branch.status is Status.FORKED and bool(branch.pending)
    )
