"""Stage 5: goals, conclusions and independent paths for the blocks of a plan, checked and asked for again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_multiverse.curation.answers import Problem, read_blocks, read_verdicts
from megatron_multiverse.curation.chain import Chain
from megatron_multiverse.curation.checks import dependences, distance, final_answer, same_answer
from megatron_multiverse.curation.dialogue import Dialogue, GiveUp, Interview
from megatron_multiverse.curation.gate import block_gains, losing_blocks
from megatron_multiverse.curation.plan import PlanBlock, PlanPart, plan_blocks, refill
from megatron_multiverse.curation.questions import Questions
from megatron_multiverse.curation.rules import Rules
from megatron_multiverse.curation.token_counts import tree_document
from megatron_multiverse.curation.trees import merge, plain_text, without_texts
from megatron_multiverse.structure import Block, Parts


class DependentPaths(Problem):
    """Paths that depend on each other; where rewriting does not help, their steps should not have been grouped."""


@dataclass(frozen=True)
class Outer:
    """An outermost block of a plan."""

    lines: tuple[int, int]
    kinds: tuple[str, ...]
    """Of the block and of those in it, outer before inner."""
    draft: Block


@dataclass
class Rewriting:
    """The blocks of one sample on their way through stage 5.

    Attributes:
        accepted: draft -> rewritten block. Drafts that come back in a later plan are not asked for again.
        flags: signs of dependence that were only to be reported.
    """

    chain: Chain
    questions: Questions
    interview: Interview
    rules: Rules
    accepted: dict[Block, Block] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)

    @property
    def written(self) -> dict[Block, Parts]:
        """`accepted` for `assemble`."""
        return {draft: (block,) for draft, block in self.accepted.items()}

    def rewrite(self, plan: Sequence[PlanPart]) -> Dialogue[list[Outer]]:
        """Ask for all blocks at once, and again for those that fail.

        Returns:
            The blocks that could not be rewritten, which `rules.failed_blocks` wants to be text; all others are in
            `accepted`.

        Raises:
            DependentPaths: paths of some blocks still depend on each other after the last attempt.
            GiveUp: other blocks could not be rewritten, and `rules` wants the sample to be set aside.
        """
        outers = outermost(plan, self.chain)
        problems: dict[Block, Problem] = {}
        spare: dict[Block, Block] = {}
        reason = None
        for attempt in range(self.rules.max_attempts):
            missing = [outer for outer in outers if outer.draft not in self.accepted]
            if not missing:
                break
            problems = yield from self._ask(plan, missing, reason)
            if not problems and attempt + 1 < self.rules.max_attempts:
                problems = self._too_long(outers, spare)
            for draft in problems:
                if draft in self.accepted:
                    del self.accepted[draft]
            reason = _numbered(problems, outers)
            if reason:
                self.interview.note(Problem(reason))
        self.accepted = spare | self.accepted
        return self._failed(outers, problems)

    def _failed(self, outers: Sequence[Outer], problems: Mapping[Block, Problem]) -> list[Outer]:
        failed = [outer for outer in outers if outer.draft not in self.accepted]
        for outer in failed:
            if isinstance(problem := problems[outer.draft], DependentPaths):
                raise DependentPaths(f"lines {outer.lines[0]}-{outer.lines[1]}: {problem}")
        if failed and self.rules.failed_blocks == "set_aside":
            raise GiveUp("rewrite", _numbered(problems, failed))
        return failed

    def _ask(
        self, plan: Sequence[PlanPart], missing: list[Outer], reason: str | None
    ) -> Dialogue[dict[Block, Problem]]:
        """One attempt: accept what is good, return what is wrong with the others."""
        drafts = [(outer.draft, outer.lines) for outer in missing]
        try:
            answer = yield from self.interview.ask(
                "rewrite", lambda attempt, why, scale: self.questions.rewrite(drafts, attempt, why, scale), reason
            )
        except Problem as problem:
            return {outer.draft: problem for outer in missing}
        results = dict(
            zip(
                (outer.draft for outer in missing),
                read_blocks(answer.text, [draft for draft, _ in drafts]),
                strict=True,
            )
        )
        problems = {draft: result for draft, result in results.items() if isinstance(result, Problem)}
        written = {draft: result for draft, result in results.items() if isinstance(result, Block)}
        problems |= yield from self._dependent([outer for outer in missing if outer.draft in written], written)
        self.accepted |= {draft: block for draft, block in written.items() if draft not in problems}
        # Without a problem every block is there, so the text can be looked at as a whole.
        return problems or self._changed(plan)

    def _dependent(self, outers: list[Outer], written: Mapping[Block, Block]) -> Dialogue[dict[Block, Problem]]:
        """Blocks whose paths depend on each other, by their words and, if asked for, by the judge."""
        found: dict[Block, Problem] = {}
        for outer in outers:
            before = self.chain.text[: self.chain.spans[outer.lines[0] - 1][0]]
            signs = list(dependences(written[outer.draft], before))
            if signs and self.rules.independence == "report":
                self.flags += signs
            elif signs:
                found[outer.draft] = DependentPaths("; ".join(signs))
        left = [outer for outer in outers if outer.draft not in found]
        if self.rules.independence == "judge" and left:
            blocks = [(written[outer.draft], outer.lines) for outer in left]
            limit = self.interview.attempts["judge"] + self.rules.max_attempts
            verdicts = yield from self.interview.until_good(
                "judge",
                lambda attempt, _, scale: self.questions.judge(blocks, attempt, scale),
                lambda text: read_verdicts(text, len(blocks)),
                limit=limit,
            )
            found |= {left[k].draft: DependentPaths("; ".join(reasons)) for k, reasons in verdicts.items()}
        return found

    def _changed(self, plan: Sequence[PlanPart]) -> dict[Block, Problem]:
        """Blocks that have changed too much, once all are there: too many words, or the final answer."""
        text = plain_text(assemble(plan, self.chain, self.written))
        drafts = [outer.draft for outer in outermost(plan, self.chain)]
        changed: dict[Block, Problem] = {}
        if (far := distance(text, self.chain.text)) > self.rules.max_distance:
            for draft in drafts:
                own = distance(plain_text((self.accepted[draft],)), plain_text((draft,)))
                if own > self.rules.max_distance:
                    changed[draft] = Problem(
                        f"its paths differ too much from the original wording (distance {own:.2f}; that of the whole "
                        f"text is {far:.2f}, and {self.rules.max_distance} is allowed)"
                    )
        if not same_answer(text, self.chain.text):
            answer = final_answer(self.chain.text)
            lost = [d for d in drafts if answer in plain_text((d,)) and answer not in plain_text((self.accepted[d],))]
            for draft in lost or drafts:
                changed.setdefault(draft, Problem(f"the final answer {answer} of the text got lost or was changed"))
        return changed

    def _too_long(self, outers: Sequence[Outer], spare: dict[Block, Block]) -> dict[Block, Problem]:
        """Blocks to be sent back for shorter goals and conclusions; as they are they go to `spare`."""
        if self.rules.losing_blocks != "shorten":
            return {}
        found: dict[Block, Problem] = {}
        for outer in outers:
            block = self.accepted[outer.draft]
            counter, wanted = self.rules.counter, self.rules.min_net_gain
            losing = losing_blocks((block,), counter, wanted)
            # With nothing in its goal and conclusion, would it pay? Otherwise shortening them is of no use.
            without = (without_texts(block),)
            bare = block_gains(without, tree_document(without, counter), counter)
            if any(bare[k].net_gain >= wanted for k in losing):
                spare[outer.draft] = block
                steps = max(gain.critical_tokens - gain.sequential_tokens for gain in losing.values())
                found[outer.draft] = Problem(
                    f"its outlines and conclusions are too long for what the block saves: make them at least {steps} "
                    "tokens shorter, and leave the paths as they are"
                )
        return found


def outermost(plan: Sequence[PlanPart], chain: Chain) -> list[Outer]:
    """The outermost blocks of a plan with their drafts."""
    found = []
    for part in plan:
        if isinstance(part, PlanBlock):
            (draft,) = refill((part,), chain)
            assert isinstance(draft, Block)
            found.append(Outer(part.lines, tuple(block.kind for block in plan_blocks((part,))), draft))
    return found


def assemble(plan: Sequence[PlanPart], chain: Chain, written: Mapping[Block, Parts]) -> Parts:
    """The whole text, with each draft replaced by what was written for it."""
    drafts = iter(outermost(plan, chain))
    parts: list[str | Block] = []
    for part in plan:
        parts += (chain.slice(*part),) if isinstance(part, tuple) else written[next(drafts).draft]
    return merge(parts)


def _numbered(problems: Mapping[Block, Problem], outers: Sequence[Outer]) -> str:
    """The problems by the numbers that the blocks will have when they are asked for again."""
    wrong = [outer.draft for outer in outers if outer.draft in problems]
    if len({str(problems[draft]) for draft in wrong}) == 1:
        return str(problems[wrong[0]])
    return "\n".join(f"Block {k}: {problems[draft]}" for k, draft in enumerate(wrong, 1))
