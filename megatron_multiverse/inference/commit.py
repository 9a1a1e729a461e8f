"""What a token does once it is chosen: text, a fork, the end of a path or of the answer."""

from __future__ import annotations

from megatron_multiverse.inference.branch import Branch, Status
from megatron_multiverse.inference.budget import exhausted, fits
from megatron_multiverse.inference.fork_join import fork
from megatron_multiverse.structure import Event


def resume(branch: Branch) -> None:
    """A branch begins or goes on: end it if its budget is spent, replay what it wrote before it had to step back."""
    if exhausted(branch):
        branch.close("length")
    while branch.status is Status.RUNNING:
        token = branch.request.replay_token(branch)
        if token is None:
            return
        commit(branch, token)


def commit(branch: Branch, token: int) -> None:
    """Take a chosen token.

    The token is recorded first, so that a request which has to start again says the same.
    """
    params = branch.request.params
    recorded = branch.request.history[branch.path]
    if branch.num_sampled == len(recorded):
        recorded.append(token)
    branch.num_sampled += 1
    stops = token == branch.machine.vocab.eos_id and not params.ignore_eos
    if stops or (branch.parent is None and token in params.stop_token_ids):
        branch.close("eos")
    elif not fits(branch, token):
        branch.close("length")
    else:
        event = branch.write([token])
        if event is Event.FORK:
            if not fork(branch):
                branch.request.counts["fork_refused"] += 1
                branch.close("length")
        elif event is Event.PATH_END:
            branch.end("path_end")
        elif exhausted(branch):
            branch.close("length")
