"""Where tokens are written, and nowhere else: text, forks, ends of paths, joins, the end of an answer.

`commit_token` takes one chosen token of one branch. Everything that follows from it is written at once: `</Goal>`
begins the paths of its block, the `</Path>` of the last path joins them and begins the conclusion, a spent budget
closes what is open. The scheduler feeds what was written, in the next steps; the cache is not touched here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_multiverse.inference.text.branch import Block, Branch, Cut, PathStart, branch_key
from megatron_multiverse.inference.text.budget import MOST_CLOSERS, exhausted, fits, shares
from megatron_multiverse.inference.text.guide import Guide
from megatron_multiverse.inference.text.result import BranchFinish, FinishReason, StopMatch, TopLogprobs
from megatron_multiverse.inference.text.scanner import StopScanner
from megatron_multiverse.inference.text.state import RequestState, Written
from megatron_multiverse.inference.text.trial import inner_branches, is_late, note_end, written_by
from megatron_multiverse.structure import Event
from megatron_multiverse.structure.frames import Problem

# By a name of the module: Python 3.11 takes five times as long to look up a member of an enum, for every token.
_PATH_END, _FORK = Event.PATH_END, Event.FORK


def commit_token(
    state: RequestState, branch: Branch, token: int, logprob: float, top: TopLogprobs | None = None
) -> None:
    """Take a chosen token, and write all that follows from it.

    Args:
        state: the request.
        branch: its branch that asked for a token.
        token: what was drawn.
        logprob: its log-probability.
        top: the most likely tokens beside it.
    """
    branch.num_sampled += 1
    if branch.guide is not None and token in branch.end_ids and _ends_thought(state, branch, branch.guide):
        return
    left = branch.room
    if token in branch.end_ids:
        sampling = state.request.sampling
        # Models name their end-of-document id in generation_config.json, too, whose ids are taken for stop tokens.
        is_eos = token == branch.machine.vocab.eos_id and not sampling.ignore_eos
        by_stop_token = token in sampling.stop_token_ids and not is_eos
        branch.stop_reason = token if by_stop_token else None
        branch.end_draw = (len(branch.ids), token, logprob)
        # A stop token that ends a path was asked for; at the root it may be a further end-of-document id.
        if sampling.on_malformed == "error" and not (by_stop_token and branch.parent is not None):
            _refuse_end(state, branch)
        _close(state, branch, "stop" if by_stop_token else "eos")
    # No branch ever has more than MOST_CLOSERS tokens to close, so most tokens need no exact count.
    elif left <= MOST_CLOSERS and not fits(branch, token):
        _close(state, branch, "length")
    else:
        event = branch.machine.push(token)
        branch.ids.append(token)
        branch.positions.append(branch.next_position)
        branch.logprobs.append(logprob)
        if branch.top_logprobs is not None:
            branch.top_logprobs.append(top)
        if branch.seen is not None:
            branch.seen.add(token)
        if branch.guide is not None:
            branch.guide.push(token)
        branch.next_position += 1
        branch.total += 1
        branch.room = left - 1
        if state.on_token is not None:
            state.unheard.append((branch.name, Written.drawn(token, logprob, top)))
        problem = branch.machine.problem
        if problem is not None and state.request.sampling.on_malformed == "error":
            _refuse(state, branch, problem)
        elif event is _PATH_END:
            _end(state, branch, "path_end")
        elif branch.scanner is not None and _stops(state, branch, branch.scanner, 1):
            _close(state, branch, "stop")
        elif branch.guide is not None and (branch.guide.error or branch.guide.is_complete):
            state.error = branch.guide.error
            _close(state, branch, "stop")
        elif event is _FORK:
            _fork(state, branch)
        elif left <= MOST_CLOSERS + 1 and exhausted(branch):
            _close(state, branch, "length")
    if branch.parent is not None and state.request.sampling.commit_after:
        _settle_around(state, branch)


def commit_text(state: RequestState, branch: Branch, length: int, token: int, logprob: float) -> bool:
    """Take a chosen token where it is plain text and nothing follows from it, as `commit_token` would, in less time.

    Args:
        state, branch, token, logprob: see `commit_token`.
        length: tokens of the branch before it.

    Returns:
        False, and nothing is done, where more may follow, or where the branch does not go on with this token.
    """
    ids = branch.ids
    if (
        len(ids) != length
        or branch.finish is not None
        or branch.room <= MOST_CLOSERS + 1
        or not branch.is_bare
        or token in branch.end_ids
        or (branch.blocks and not branch.blocks[-1].joined)
        or not branch.machine.take_text(token)
    ):
        return False
    ids.append(token)
    branch.positions.append(branch.next_position)
    branch.logprobs.append(logprob)
    branch.num_sampled += 1
    branch.next_position += 1
    branch.total += 1
    branch.room -= 1
    if state.on_token is not None:
        state.unheard.append((branch.name, Written.drawn(token, logprob, None)))
    return True


def begin_answer(state: RequestState) -> None:
    """Write what the request says that its answer begins with (`Request.answer_start`)."""
    root, ids = state.root, state.request.answer_start
    if ids:
        if root.guide is not None:
            for token in ids:
                root.guide.push(token)
        event = _force(state, root, ids)
        _check_forced(state, root, len(ids))
        if event is _FORK and root.finish is None:
            _fork(state, root)


def close_all(state: RequestState, finish: FinishReason) -> None:
    """End every branch of a request where it stands, with its structure closed."""
    state.finish_reason = finish
    _close_tree(state, state.root, "abort" if finish == "stop" else finish)


def _close_tree(state: RequestState, branch: Branch, reason: BranchFinish) -> None:
    if branch.open_block is not None:
        for kid in branch.open_block.kids:
            _close_tree(state, kid, reason)  # the last of them joins the block
    if branch.finish is None:
        _close(state, branch, reason)


def _ends_thought(state: RequestState, branch: Branch, guide: Guide) -> bool:
    """The model ended its text: whether that ends a thought alone, since the answer is held to a grammar and has not
    said anything. The thought is closed then."""
    closing = branch.machine.closing_ids(of_prompt=True)
    is_open = branch.machine.in_thought and len(closing) <= branch.room
    if guide.holds or not is_open or state.request.sampling.on_malformed == "error":
        return False
    branch.forced_close = True
    _force(state, branch, closing)
    for token in closing:
        guide.push(token)
    _check_forced(state, branch, len(closing))
    return True


def _refuse_end(state: RequestState, branch: Branch) -> None:
    """The model ended its text in a branch: that breaks the grammar where anything is open, a path itself included."""
    tag_of = branch.machine.vocab.tag_of
    closing = branch.machine.closing_ids(of_prompt=True)
    missing = next((tag_of[token] for token in closing if token in tag_of), None)
    if missing is not None:
        index = len(branch.ids) - branch.prompt_length
        _refuse(state, branch, Problem("unclosed", index, "the end of the text", missing.text))


def _refuse(state: RequestState, branch: Branch, problem: Problem) -> None:
    """Make broken grammar the error of the request, which then ends (`SamplingParams.on_malformed`)."""
    state.counts["refused"] += 1
    where = f"path {branch.name}" if branch.name else "the text outside of paths"
    state.error = (
        f"the output breaks the grammar at token {problem.token_index} of {where}: found {problem.found}, "
        f"expected {problem.expected}"
    )


def _force(
    state: RequestState, branch: Branch, ids: Sequence[int], *, heard: bool = True, stop: StopMatch | None = None
) -> Event:
    """Append tokens that nobody drew, and have them heard; returns what the last of them did."""
    event = Event.TEXT
    for token in ids:
        event = branch.machine.push(token)
    _append_forced(state, branch, ids, heard=heard, stop=stop)
    return event


def _append_forced(
    state: RequestState, branch: Branch, ids: Sequence[int], *, heard: bool = True, stop: StopMatch | None = None
) -> None:
    """The part of `_force` that is left once the branch's grammar has read the tokens."""
    count = len(ids)
    branch.ids += ids
    branch.positions += range(branch.next_position, branch.next_position + count)
    branch.logprobs += [None] * count
    if branch.top_logprobs is not None:
        branch.top_logprobs += [None] * count
    branch.next_position += count
    branch.total += count
    branch.room -= count
    if heard and state.on_token is not None:
        state.unheard.append((branch.name, Written.forced(ids, stop)))


def _check_forced(state: RequestState, branch: Branch, count: int) -> None:
    """End the branch if its last `count` tokens, all forced, complete a stop text or take the last of its budget."""
    if branch.scanner is not None and _stops(state, branch, branch.scanner, count):
        _close(state, branch, "stop")
    elif branch.room <= MOST_CLOSERS and exhausted(branch):
        _close(state, branch, "length")


def _stops(state: RequestState, branch: Branch, scanner: StopScanner, count: int) -> bool:
    """Whether the last `count` tokens of a branch complete a stop text."""
    counts = branch.parent is not None or branch.total >= state.request.sampling.min_tokens
    match = scanner.find(branch.ids, count, counts=counts)
    if match is None:
        return False
    branch.stop, branch.stop_reason = match, match.text
    return True


def foresee_fork(state: RequestState, branch: Branch) -> None:
    """Make what the paths begin with, in case that the next token, still to come, is `</Goal>`: where
    `StructureMachine.may_fork` says that it may be."""
    machine = branch.machine
    if machine.max_paths is None or len(machine.outlines) <= machine.max_paths:
        branch.foreseen = (len(branch.ids), _path_starts(state, branch))


def _path_starts(state: RequestState, branch: Branch) -> list[PathStart]:
    """What the paths of the block announced last begin with. `</Goal>` changes none of it."""
    machine, sampling, starts = branch.machine, state.request.sampling, []
    ordinal = len(branch.blocks) - branch.prompt_blocks
    for k, outline in enumerate(machine.outlines):
        path, own = (*branch.path, (ordinal, k)), machine.fork(k)
        prefix = machine.vocab.path_prefix(outline.label_ids)
        for token in prefix:
            own.push(token)
        starts.append(PathStart(path, own, prefix, branch_key(sampling.seed, state.request.sample, path)))
    return starts


def _fork(state: RequestState, branch: Branch) -> None:
    """Begin the paths of the block just announced; if their forced tokens do not fit, close the branch instead."""
    machine = branch.machine
    foreseen_at, starts = branch.foreseen or (-1, [])
    branch.foreseen = None
    if foreseen_at != len(branch.ids) - 1:
        starts = _path_starts(state, branch)
    prefixes = [start.prefix for start in starts]
    budgets = shares(branch, prefixes, state.request.sampling.branch_max_tokens)
    if budgets is None:
        branch.fork_refused = True
        _close(state, branch, "length")
        return
    sampling = state.request.sampling
    state.num_blocks += 1
    block = Block(state.num_blocks, len(branch.ids), [])
    for k, (outline, budget, start) in enumerate(zip(machine.outlines, budgets, starts, strict=True)):
        kid = Branch(
            machine=start.machine,
            next_position=branch.next_position,
            budget=budget,
            key=start.key,
            parent=branch,
            path=start.path,
            name=f"{branch.name}.{k + 1}" if branch.name else str(k + 1),
            outline=outline.label,
            block=block.number,
            versions=[(0, state.weight_version)],
            top_logprobs=None if branch.top_logprobs is None else [],
            seen=None if branch.seen is None else branch.seen.copy(),
            end_ids=state.path_end_ids,
            scanner=state.new_scanner() if sampling.stop_in_branches else None,
        )
        kid.is_bare = state.keeps_nothing_beside(kid)
        kid.count_room()
        block.kids.append(kid)
    branch.blocks.append(block)
    state.end_span(branch, state.step + 1)
    for kid, prefix in zip(block.kids, prefixes, strict=True):
        _append_forced(state, kid, prefix)
    for kid, prefix in zip(block.kids, prefixes, strict=True):
        _check_forced(state, kid, len(prefix))


def _join(state: RequestState, branch: Branch) -> None:
    """All paths of the last block have ended: go on after the longest of them, with the conclusion."""
    block = branch.blocks[-1]
    block.joined = True
    branch.total += sum(kid.total for kid in block.kids)
    branch.dropped_tokens += sum(kid.dropped_tokens for kid in block.kids)
    if block.commit_at is not None:
        tried = [(kid.tried, len(kid.ids)) for kid in block.kids if kid.tried is not None]
        written = [sum(1 for _ in written_by(old, block.commit_at)) - kept for old, kept in tried]
        branch.dropped_tokens += sum(max(0, extra) for extra in written)
    if branch.seen is not None:
        branch.seen.join([kid.seen for kid in block.kids if kid.seen is not None])
    branch.next_position = max(kid.next_position for kid in block.kids)
    branch.count_room()
    branch.machine.join()
    if branch.scanner is not None:
        branch.scanner.begin(block.at)
    prefix = branch.machine.vocab.conclusion_prefix()
    _force(state, branch, prefix)
    _check_forced(state, branch, len(prefix))


def _close(state: RequestState, branch: Branch, finish: BranchFinish) -> None:
    """Write what closes everything that is open, and end the branch."""
    closing = branch.closing_ids()
    if closing:
        branch.forced_close = True
        _force(state, branch, closing, stop=branch.stop)
    _end(state, branch, finish)


def _end(state: RequestState, branch: Branch, finish: BranchFinish) -> None:
    """The text of the branch is complete; the last path of a block to end joins it."""
    branch.finish = finish
    state.end_span(branch, state.step + 1)
    parent = branch.parent
    if parent is None:
        return
    block = parent.blocks[-1]
    if finish == "path_end" and state.request.sampling.commit_after and state.finish_reason is None:
        note_end(state, block, branch)
    if block.commit_at is not None and state.finish_reason is None:
        _drop_late(state, parent, block, block.commit_at)
    if all(kid.finish is not None for kid in block.kids):
        _join(state, parent)


def _drop_late(state: RequestState, parent: Branch, block: Block, commit_at: int) -> None:
    """Drop the tries that are late in the open block of a branch."""
    for k, kid in enumerate(block.kids):
        if kid.finish != "dropped" and is_late(kid, commit_at):
            _drop(state, parent, k)


def _settle_around(state: RequestState, branch: Branch) -> None:
    """The branch has gone on: that may make it late, or the paths around it."""
    parent = branch.parent
    while parent is not None:
        block = parent.open_block
        if block is not None and block.commit_at is not None and state.finish_reason is None:
            _drop_late(state, parent, block, block.commit_at)
            if all(kid.finish is not None for kid in block.kids):
                _join(state, parent)
        parent = parent.parent


def _drop(state: RequestState, parent: Branch, k: int) -> None:
    """Cut path `k` of the open block to its forced beginning, and close it."""
    kid = parent.blocks[-1].kids[k]
    inner = list(inner_branches(kid))
    for branch in (kid, *inner):
        state.end_span(branch, state.step + 1)
    for branch in inner:
        branch.finish = branch.finish or "dropped"
    kid.tried = dataclasses.replace(kid)
    kid.machine, kid.next_position = parent.machine.fork(k), parent.next_position
    kid.ids, kid.positions, kid.logprobs, kid.blocks = [], [], [], []
    kid.top_logprobs = None if kid.top_logprobs is None else []
    kid.seen = None if parent.seen is None else parent.seen.copy()
    kid.versions = [(0, state.weight_version)]
    kid.scanner = kid.stop = kid.stop_reason = kid.end_draw = None
    kid.total = kid.dropped_tokens = 0
    kid.forced_close = kid.fork_refused = False  # of text that is no part of the answer
    _force(state, kid, parent.machine.vocab.path_prefix(parent.machine.outlines[k].label_ids), heard=False)
    state.cuts.append(Cut(kid, len(kid.ids), inner))
    _force(state, kid, kid.machine.closing_ids(), heard=kid.finish is None)
    kid.finish = "dropped"
