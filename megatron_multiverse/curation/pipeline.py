"""The five stages for one sample, from top to bottom: read `_Curation.run`.

`curate_chain` is a generator that asks and is told: it yields requests and is sent an answer or a failure for each.
Whoever drives it decides whether answers come from a live endpoint, from a batch or from an earlier run. So a sample
whose answers were kept is taken up again by sending them once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_multiverse.curation.answers import read_groups, read_steps
from megatron_multiverse.curation.chain import cut_chain
from megatron_multiverse.curation.checks import distance
from megatron_multiverse.curation.dialogue import Dialogue, GiveUp, Interview
from megatron_multiverse.curation.gate import block_gains, flatten_losing, losing_blocks
from megatron_multiverse.curation.plan import PlanPart, build_plan, drop_outermost, flatten_plan, refill
from megatron_multiverse.curation.questions import Questions
from megatron_multiverse.curation.rewriting import DependentPaths, Rewriting, assemble, outermost
from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.token_counts import count_plain, tree_document
from megatron_multiverse.curation.trees import plain_text
from megatron_multiverse.structure import TAGS, Block, Parts, measure


@dataclass(frozen=True)
class Passed:
    """A curated chain, and what became of it on the way."""

    parts: Parts
    details: dict[str, Any]


@dataclass(frozen=True)
class SetAside:
    """A chain that could not be curated."""

    code: str
    """A short stable reason: refusal, context_window, provider, input, or the stage that failed."""
    reason: str
    history: list[dict[str, Any]]


Outcome = Passed | SetAside


def curate_chain(text: str, rules: Rules) -> Dialogue[Outcome]:
    """Curate one chain.

    Args:
        text: the chain, without structure tags.
        rules: what it has to pass.
    """
    curation = _Curation(text, rules)
    try:
        return (yield from curation.run())
    except GiveUp as error:
        return SetAside(error.code, str(error), curation.interview.history)


class _Curation:
    def __init__(self, text: str, rules: Rules) -> None:
        self.rules = rules
        self.chain = cut_chain(text)
        self.interview = Interview(rules.max_attempts)
        self.questions = Questions(self.chain, rules.effort, is_cached=rules.is_cached)
        self.rewriting = Rewriting(self.chain, self.questions, self.interview, rules)
        self.flattened: Counter[str] = Counter()
        """Blocks that are text again, by reason."""

    def run(self) -> Dialogue[Passed]:
        self._refuse_unusable()
        steps = yield from self.interview.until_good(
            "outline", self.questions.outline, lambda text: read_steps(text, self.chain)
        )
        reason = None
        for is_last in (False, True):
            groups = yield from self.interview.until_good(
                "groups",
                lambda attempt, why, scale: self.questions.groups(steps, attempt, why, scale),
                lambda text: read_groups(text, steps),
                reason,
                limit=self.rules.max_attempts * (1 + is_last),
            )
            plan = build_plan(steps, groups)
            parts = self._without_hopeless(plan.parts)
            try:
                failed = yield from self.rewriting.rewrite(parts)
                break
            except DependentPaths as problem:
                if is_last:
                    raise GiveUp("independence", str(problem)) from problem
                reason = f"The paths of a block could not be made independent of each other. {problem}"
        self.flattened["not rewritten"] += sum(len(outer.kinds) for outer in failed)
        parts = drop_outermost(parts, [k for k, outer in enumerate(outermost(parts, self.chain)) if outer in failed])
        before = assemble(parts, self.chain, self.rewriting.written)
        after, kinds = self._gate(parts)
        return Passed(after, self._details(before, after, kinds, plan.arranged))

    def _refuse_unusable(self) -> None:
        if not self.chain.num_lines:
            raise GiveUp("input", "the chain is empty")
        if found := [tag for tag in TAGS if tag in self.chain.text]:
            raise GiveUp("input", f"the chain holds the tag {found[0]} already; take the tags out first")

    def _without_hopeless(self, parts: tuple[PlanPart, ...]) -> tuple[PlanPart, ...]:
        """Drop, before anything is paid for them, blocks that do not pay even without their conclusions."""
        while losing := losing_blocks(refill(parts, self.chain), self.rules.counter, self.rules.min_net_gain):
            self.flattened["too short"] += len(losing)
            parts = flatten_plan(parts, losing)
        return parts

    def _gate(self, plan: Sequence[PlanPart]) -> tuple[Parts, list[str]]:
        """Flatten the blocks that do not pay; one of which nothing is left becomes its original lines again.

        Returns:
            The tree, and the kinds of its blocks, outer before inner.
        """
        left: dict[Block, Parts] = {}
        kinds: list[str] = []
        gone = []
        for k, outer in enumerate(outermost(plan, self.chain)):
            block = self.rewriting.accepted[outer.draft]
            left[outer.draft], indices = flatten_losing((block,), self.rules.counter, self.rules.min_net_gain)
            self.flattened["no net gain"] += len(outer.kinds) - len(indices)
            kinds += [outer.kinds[index] for index in indices]
            gone += [] if indices else [k]
        return assemble(drop_outermost(plan, gone), self.chain, left), kinds

    def _details(self, before: Parts, after: Parts, kinds: list[str], arranged: Counter[str]) -> dict[str, Any]:
        counter = self.rules.counter
        document = tree_document(after, counter)
        return {
            "distance": distance(plain_text(after), self.chain.text),
            "plain_tokens": count_plain(after, counter),
            "before_gate": asdict(measure(document if after == before else tree_document(before, counter))),
            "statistics": asdict(measure(document)),
            "blocks": [
                {"kind": kind, "depth": gain.depth, "paths": len(gain.block.paths), "net_gain": round(gain.net_gain, 4)}
                for kind, gain in zip(kinds, block_gains(after, document, counter), strict=True)
            ],
            "flattened": dict(self.flattened),
            "groups": dict(arranged),
            "signs_of_dependence": self.rewriting.flags,
            "history": self.interview.history,
        }
