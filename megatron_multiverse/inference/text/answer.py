"""From the tree of branches to the answer: one list of tokens in text order, with the labels that training gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from megatron_multiverse.inference.text.branch import Branch, BranchPath, branch_key
from megatron_multiverse.inference.text.result import BlockResult, BranchResult, DroppedText, EndDraw, Result
from megatron_multiverse.inference.text.state import RequestState
from megatron_multiverse.inference.text.trial import written_by


def make_result(state: RequestState) -> Result:
    """The answer to a request all of whose branches have ended."""
    assert state.finish_reason is not None
    result = Result(
        request_id=state.request_id,
        prompt_ids=list(state.request.prompt_ids),
        token_ids=[],
        position_ids=[],
        logprobs=[],
        top_logprobs=None if state.root.top_logprobs is None else [],
        labels=[],
        parents=[],
        blocks=[],
        finish_reason=state.finish_reason,
        critical_tokens=state.root.next_position - state.root.positions[state.root.prompt_length - 1] - 1,
        decode_steps=state.decode_steps,
        malformed=Counter(state.counts),
        seed=state.request.sampling.seed,
        sample=state.request.sample,
        dropped_tokens=state.root.dropped_tokens,
        freed_pages=state.freed_pages,
        stop_reason=state.root.stop_reason,
        timeline=sorted(state.timeline, key=lambda span: (span.start, span.block, span.branch)),
        cached_tokens=state.cached_tokens,
        preemptions=state.preemptions,
        error=state.error,
    )
    if state.scores is not None:
        result.prompt_logprobs = list(state.scores.logprobs)
        if state.request.sampling.prompt_logprobs:
            result.prompt_top_logprobs = list(state.scores.top_logprobs)
    _append_branch(result, state.root, -1)
    for branch in state.branches():
        result.malformed.update(branch.machine.malformed)
        # The model ended its text in a thought that its prompt opened, or in something that the engine has closed.
        is_open = branch.machine.in_thought and not state.request.sampling.leave_open
        by_model = branch.finish == "eos" and (branch.forced_close or is_open)
        closed, refused = int(branch.forced_close), int(branch.fork_refused)
        ended = Counter(forced_close=closed, fork_refused=refused, unclosed=int(by_model))
        result.malformed.update(+ended)
    return result


def _append_branch(result: Result, branch: Branch, parent: int) -> None:
    """Append the text of a branch and of its blocks; `parent`: index of the token before its first one."""
    done = branch.prompt_length
    for block in branch.blocks[branch.prompt_blocks :]:
        parent = _append_tokens(result, branch, done, block.at, parent)
        done = block.at
        record = BlockResult(block.number, branch.name)
        result.blocks.append(record)
        for kid in block.kids:
            start = len(result.token_ids)
            _append_branch(result, kid, parent)
            end = len(result.token_ids)
            dropped = None
            if kid.tried is not None and block.commit_at is not None:
                dropped = DroppedText([], [], [])
                for writer, index in written_by(kid.tried, block.commit_at):
                    dropped.token_ids.append(writer.ids[index])
                    dropped.position_ids.append(writer.positions[index])
                    dropped.logprobs.append(writer.logprobs[index])
            record.branches.append(
                BranchResult(
                    kid.name, kid.path, kid.outline, start, end, kid.finish or "abort", kid.stop_reason, dropped
                )
            )
        _shift_labels(result, record)
    if branch.stop is not None:
        here = len(result.token_ids) - done
        result.stops.append(branch.stop._replace(start=here + branch.stop.start, end=here + branch.stop.end))
    if branch.end_draw is not None:
        length, token, logprob = branch.end_draw
        before = len(result.token_ids) + length - done - 1 if length > done else parent
        result.ends.append(EndDraw(before, token, logprob))
    _append_tokens(result, branch, done, len(branch.ids), parent)


def answer_text(result: Result, detokenize: Callable[[list[int]], str]) -> str:
    """The text of an answer, tags kept, without the stop texts that ended it or its paths (`include_stop` keeps them).

    Args:
        result: the answer.
        detokenize: ids -> text, tags kept.
    """
    text, done = "", 0
    for stop in result.stops:
        text += detokenize(result.token_ids[done : stop.start]) + stop.kept
        done = stop.end
    return text + detokenize(result.token_ids[done:])


def _append_tokens(result: Result, branch: Branch, start: int, end: int, parent: int) -> int:
    """Append own tokens [start, end) of a branch; returns the index of the last token of the branch so far."""
    first = len(result.token_ids)
    count = end - start
    result.token_ids += branch.ids[start:end]
    result.position_ids += branch.positions[start:end]
    result.logprobs += branch.logprobs[start:end]
    if result.top_logprobs is not None and branch.top_logprobs is not None:
        result.top_logprobs += branch.top_logprobs[start:end]
    result.weight_versions += _versions(branch, start, end)
    result.labels += range(len(result.prompt_ids) + first, len(result.prompt_ids) + first + count)
    result.parents += [parent, *range(first, first + count - 1)] if count else []
    return first + count - 1 if count else parent


def _versions(branch: Branch, start: int, end: int) -> list[int]:
    """The version of the weights that wrote each of the own tokens [start, end) of a branch."""
    if len(branch.versions) == 1:
        return [branch.versions[0][1]] * (end - start)
    versions: list[int] = []
    for (first, version), (after, _) in zip(branch.versions, [*branch.versions[1:], (end, 0)], strict=True):
        versions += [version] * (min(after, end) - max(first, start))
    return versions


def _shift_labels(result: Result, block: BlockResult) -> None:
    """Hide the paths of a block from each other: r = i + the sum over all blocks around a token of (E - e) - (s - S),
    where [S, E) are the paths of the block and [s, e) is the token's own path (docs/structure.md)."""
    first, last = block.branches[0].start, block.branches[-1].end
    for path in block.branches:
        shift = (last - path.end) - (path.start - first)
        for k in range(path.start, path.end):
            result.labels[k] += shift


def drawn_from(result: Result, *, seed: int = 0, sample: int = 0) -> dict[tuple[int, int], int]:
    """Which token of an answer each draw was made from: what compares logits of single steps with one forward pass.

    Args:
        result: the answer.
        seed: of the request's `SamplingParams`.
        sample: of the request.

    Returns:
        (key of a branch, index among the tokens it drew) -> index in the answer of the token before; -1 is the last
        token of the prompt. Every branch has one entry beyond its tokens, since what ended it may have been drawn
        without being part of the answer; a try that was dropped has none, since nothing it drew is in the answer.
    """
    paths: list[BranchPath] = [()] * len(result.token_ids)
    for block in result.blocks:  # outer blocks come before inner ones
        for branch in block.branches:
            paths[branch.start : branch.end] = [branch.path] * (branch.end - branch.start)
    keys = {path: branch_key(seed, sample, path) for path in {(), *paths}}
    table: dict[tuple[int, int], int] = {}
    count: Counter[BranchPath] = Counter()
    last: dict[BranchPath, int] = {(): -1}
    for index, (path, drawn) in enumerate(zip(paths, result.sampled, strict=True)):
        last[path] = index
        if drawn:
            table[keys[path], count[path]] = result.parents[index]
            count[path] += 1
    dropped = {branch.path for block in result.blocks for branch in block.branches if branch.finish == "dropped"}
    return table | {(keys[path], count[path]): index for path, index in last.items() if path not in dropped}
