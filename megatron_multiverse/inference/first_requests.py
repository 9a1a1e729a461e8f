"""What an engine answers before anybody waits for it, so that kernels are compiled and common graphs recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.structure import StructureVocab, Tag

PROMPT, PATHS = 80, 3
"""Tokens of a prompt that is long enough to be read as one, and paths of the block."""
LONGEST_PROMPT, MOST_CHUNKS = 1 << 14, 64
"""Most tokens of the long prompt, and most steps in which it is read, however few tokens a step may bring."""


def warm_up(engine: Engine) -> None:
    """Read a long prompt in chunks while a text and a block's paths are written, which are joined.

    Args:
        engine: idle; what it cannot serve is left out.
    """
    if engine.intake.grammars is not None:
        with contextlib.suppress(GenerationError):  # llguidance is not installed: requests with grammars are told so
            engine.intake.grammars.prepare()
    requests = []
    for request in _requests(engine):
        try:
            engine.check(request)
        except GenerationError:
            continue
        requests.append(request)
    if requests:
        engine.generate(requests)


def _requests(engine: Engine) -> Iterator[Request]:
    most = max(min(engine.max_position - 2, engine.book.num_pages * engine.book.page_size // 2), 1)
    prompt = [0] * min(PROMPT, most)
    yield Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=8, ignore_eos=True, max_depth=0))
    header = _header(engine.intake.vocab)
    if header is not None:
        critical = len(header) + 64
        sampling = SamplingParams(max_tokens=8 * critical, max_critical_tokens=critical, branch_max_tokens=16)
        yield Request(prompt_ids=prompt, sampling=sampling, answer_start=header)
    chunk = engine.config.max_step_tokens
    long = min(engine.runner.long_prompt(chunk), LONGEST_PROMPT, MOST_CHUNKS * chunk, most)
    yield Request(prompt_ids=[0] * long, sampling=SamplingParams(max_tokens=2))


def _header(vocab: StructureVocab) -> list[int] | None:
    """A block's header; None if labels cannot be written with single digits and a colon."""
    token_of = {text: token for token, text in vocab.label_pieces.items()}
    ids = [vocab.tag_ids[Tag.PARALLEL], vocab.newline_id, vocab.tag_ids[Tag.GOAL]]
    for path in range(1, PATHS + 1):
        label = [token_of.get(str(path)), token_of.get(":")]
        known = [token for token in label if token is not None]
        if len(known) < len(label):
            return None
        outline, end = vocab.tag_ids[Tag.OUTLINE], vocab.tag_ids[Tag.END_OUTLINE]
        ids += [vocab.newline_id, outline, vocab.newline_id, *known, end]
    return [*ids, vocab.newline_id, vocab.tag_ids[Tag.END_GOAL]]
