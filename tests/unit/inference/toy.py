"""A toy model, a toy vocabulary and random scripts for the engine's tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request, Result, SamplingArrays, drawn_from
from megatron_multiverse.inference.preemption import preempt
from megatron_multiverse.inference.text.branch import BranchPath, branch_key
from megatron_multiverse.kernels.sampling import token_logprobs
from megatron_multiverse.model.attention import AttentionParams, LayoutParams
from megatron_multiverse.structure import TAGS, StructureVocab, Tag, lay_out, parse

torch.set_num_threads(1)

NEWLINE, COLON, EOS, TEXT, VOCAB_SIZE = 12, 24, 25, 26, 48
PIECES = [*TAGS, "\n", *"0123456789", ".", ":", "<eos>", *(chr(ord("a") + k) for k in range(VOCAB_SIZE - TEXT))]
VOCAB = StructureVocab.from_pieces(PIECES, eos_id=EOS)


def toy_text(ids: Sequence[int]) -> str:
    """What a tokenizer makes of ids."""
    return "".join(PIECES[token] for token in ids)


DIM, HEADS, GROUPS, HEAD_DIM = 16, 4, 2, 8


def ids_of(text: str) -> list[int]:
    """The ids of a text without tags, character by character."""
    return [PIECES.index(char) for char in text]


class ToyModel(nn.Module):
    """Two attention layers with rotary by position ids, in float64; called like megatron-core's GPTModel."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=2, num_query_groups=GROUPS, kv_channels=HEAD_DIM)
        self.max_sequence_length, self.vocab_size = 4096, VOCAB_SIZE
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5)

        self.embedding = weight(VOCAB_SIZE, DIM)
        wide = (HEADS + 2 * GROUPS) * HEAD_DIM
        self.qkv = nn.ParameterList(weight(DIM, wide) for _ in range(2))
        self.out = nn.ParameterList(weight(HEADS * HEAD_DIM, DIM) for _ in range(2))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, mask: None, packed_seq_params: AttentionParams
    ) -> Tensor:
        x = 4 * self.embedding[input_ids].transpose(0, 1)
        for k in range(2):
            qkv = (nn.functional.rms_norm(x, (DIM,)) @ self.qkv[k]).unflatten(-1, (-1, HEAD_DIM))
            q, key, value = qkv.split([HEADS, GROUPS, GROUPS], dim=2)
            q, key = _rotate(q, position_ids), _rotate(key, position_ids)
            x = x + packed_seq_params.attend(q, key, value, layer_number=k + 1, softmax_scale=0.5) @ self.out[k]
        return (3 * nn.functional.rms_norm(x, (DIM,)) @ self.embedding.t()).transpose(0, 1)


class NullModel(nn.Module):
    """Attends to nothing and knows nothing: for tests in which only the scheduling counts."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=1, num_query_groups=1, kv_channels=1)
        self.max_sequence_length, self.vocab_size = 4096, VOCAB_SIZE
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros(*input_ids.shape, VOCAB_SIZE)


def _rotate(x: Tensor, position_ids: Tensor) -> Tensor:
    frequencies = 100.0 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64, device=x.device) / (HEAD_DIM // 2))
    angle = (position_ids.t()[..., None] * frequencies)[:, :, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


Script = dict[BranchPath, list[int]]


def random_script(
    rng: random.Random, *, depth: int = 2, blocks: int = 2, most_paths: int = 4, text: int = 12, free: bool = False
) -> Script:
    """What each branch samples, by branch path: text with nested and repeated blocks, well formed.

    `free`: -1 instead of words, where the model chooses.
    """
    script: Script = {}

    def words(least: int = 0) -> list[int]:
        return [-1 if free else rng.randrange(TEXT, VOCAB_SIZE) for _ in range(rng.randint(least, text))]

    def branch(path: tuple[tuple[int, int], ...], prefix: str, level: int) -> None:
        own = script.setdefault(path, [])
        own += words(1)
        for ordinal in range(rng.randint(0, blocks) if level else blocks):
            if level == depth:
                break
            paths = rng.randint(1, most_paths)
            own += [Tag.PARALLEL, NEWLINE, Tag.GOAL]
            for k in range(paths):
                own += [NEWLINE, Tag.OUTLINE, NEWLINE, *ids_of(f"{prefix}{k + 1}:"), *words(), Tag.END_OUTLINE]
            own += [NEWLINE, Tag.END_GOAL]
            for k in range(paths):
                branch((*path, (ordinal, k)), f"{prefix}{k + 1}.", level + 1)
            own += [*words(), Tag.END_CONCLUSION, NEWLINE, Tag.END_PARALLEL, *words(1)]
        own.append(Tag.END_PATH if path else EOS)

    branch((), "", 0)
    return {path: [int(token) for token in own] for path, own in script.items()}


def tags_on_own_lines(script: Script) -> Script:
    """The script with a newline before each `</Path>`, as training data have it."""
    return {path: [*ids[:-1], NEWLINE, ids[-1]] if path else ids for path, ids in script.items()}


class ScriptedSampler:
    """Plays scripts (the request with `sample` k plays script k) and keeps the logits each token was drawn from."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.scripts = {branch_key(0, k, path): ids for k, script in enumerate(scripts) for path, ids in script.items()}
        self.logits: dict[tuple[int, int], Tensor] = {}
        """(key of the branch, index among the tokens it has drawn) -> logits [vocab]."""

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        tokens = []
        for row, key, index in zip(logits, sampling.keys.tolist(), sampling.indices.tolist(), strict=True):
            script = self.scripts[key]
            if OVERLAP and index == len(script):
                tokens.append(TEXT)  # this step was planned before the end was known; its token is dropped
                continue
            self.logits[key, index] = row.to("cpu", copy=True)
            token = script[index]
            tokens.append(TEXT + int(row[TEXT:].argmax()) if token < 0 else token)
        return with_logprobs(logits, tokens)


def with_logprobs(logits: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a sampler returns."""
    chosen = torch.tensor(tokens, dtype=torch.int64).to(logits.device)
    return chosen, token_logprobs(logits, chosen)


class SoupSampler:
    """Random ids with many tags, whole headers and ends of text, a function of (seed, branch) alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.streams: dict[int, list[int]] = {}

    def __call__(self, logits: Tensor, sampling: SamplingArrays) -> tuple[Tensor, Tensor]:
        return with_logprobs(logits, [self._token(*pair) for pair in zip(sampling.keys, sampling.indices, strict=True)])

    def _token(self, key: int, index: int) -> int:
        stream = self.streams.setdefault(int(key), [])
        while len(stream) <= index:
            stream += self._snippet(random.Random(f"{self.seed} {key} {len(stream)}"))
        return stream[index]

    def _snippet(self, rng: random.Random) -> list[int]:
        kind = rng.random()
        if kind < 0.3:
            paths = rng.choice([0, 1, 2, 2, 3, 12])
            gap = [NEWLINE] if rng.random() < 0.9 else []
            ids = [int(Tag.PARALLEL), *gap, int(Tag.GOAL)]
            for number in range(paths):
                label = ids_of(f"{number + 1}:") if rng.random() < 0.95 else []
                ids += [*gap, int(Tag.OUTLINE), NEWLINE, *label, TEXT, int(Tag.END_OUTLINE)]
            ids += [*gap, int(Tag.END_GOAL)]
            return ids if rng.random() < 0.9 else ids[: rng.randint(1, len(ids))]
        if kind < 0.5:
            return [int(Tag.END_CONCLUSION), NEWLINE, int(Tag.END_PARALLEL)][: rng.randint(1, 3)]
        if kind < 0.6:
            return [int(Tag.END_PATH)]
        if kind < 0.63:
            return [EOS]
        if kind < 0.75:
            return [rng.randrange(12)]
        return [rng.randrange(12, VOCAB_SIZE) for _ in range(rng.randint(1, 6))]


def forward_logits(model: nn.Module, prompt: Sequence[int], result: Result, inert: int | None = None) -> Tensor:
    """Logits [prompt + answer, vocab] of one teacher-forced forward over the layout that structure/ gives; structure
    counts after `inert` tokens, by default the prompt."""
    ids = [*prompt, *result.token_ids]
    plan = lay_out(parse(ids, VOCAB, prompt_length=len(prompt) if inert is None else inert, strict=False))
    device = next(model.parameters()).device
    params = LayoutParams.from_labels(torch.from_numpy(plan.r)[None].long().to(device), backend="dense")
    positions = torch.from_numpy(plan.position_ids)[None].long().to(device)
    with torch.no_grad():
        return model(torch.tensor([ids]).to(device), positions, None, packed_seq_params=params)[0].cpu()


def structure_positions(prompt: Sequence[int], result: Result) -> list[int]:
    ids = np.array([*prompt, *result.token_ids])
    return lay_out(parse(ids, VOCAB, prompt_length=len(prompt), strict=False)).position_ids[len(prompt) :].tolist()


def largest_difference(
    model: nn.Module,
    sampler: ScriptedSampler,
    requests: Sequence[Request],
    results: Sequence[Result],
    *,
    logprob_atol: float = 1e-9,
    tokens_only: bool = False,
) -> float:
    """Largest difference between the logits of any decode step and those of the teacher-forced forward.

    tokens_only: leave out logits that belong to no token of the answers: those of tries that were dropped, and of the
    end of text or stop token of a branch that was closed after it.
    """
    largest = 0.0
    seen = 0
    for request, result in zip(requests, results, strict=True):
        inert = request.replay_structure[0][0] if request.replay_structure else None
        reference = forward_logits(model, request.prompt_ids, result, inert)
        table = drawn_from(result, seed=request.sampling.seed, sample=request.sample)
        for drawn, before in table.items():
            if drawn in sampler.logits and (not tokens_only or (drawn[0], drawn[1] + 1) in table):
                seen += 1
                expected = reference[len(request.prompt_ids) + before]
                difference = (sampler.logits[drawn] - expected).abs().max().item()
                assert difference == difference, "NaN: a freed page was read"
                largest = max(largest, difference)
        assert_logprobs(reference, request, result, logprob_atol)
    assert tokens_only or seen == len(sampler.logits), "some logits belong to no token of the answers"
    return largest


def assert_logprobs(reference: Tensor, request: Request, result: Result, atol: float) -> None:
    """The log-probabilities of an answer are those of one forward over it, and so are its labels."""
    ids = [*request.prompt_ids, *result.token_ids]
    expected = lay_out(parse(ids, VOCAB, prompt_length=len(request.prompt_ids), strict=False))
    assert result.labels == expected.r[len(request.prompt_ids) :].tolist()
    for index, (parent, logprob) in enumerate(zip(result.parents, result.logprobs, strict=True)):
        if logprob is not None:
            row = reference[len(request.prompt_ids) + parent].log_softmax(-1)
            assert abs(row[result.token_ids[index]].item() - logprob) < atol


def ask(prompt_ids: Sequence[int], *, sample: int = 0, **sampling: object) -> Request:
    """A request; `sampling`: fields of SamplingParams."""
    return Request(prompt_ids=prompt_ids, sampling=SamplingParams(**sampling), sample=sample)  # type: ignore[arg-type]


def changed(request: Request, **sampling: object) -> Request:
    """The same request with other sampling parameters."""
    return replace(request, sampling=replace(request.sampling, **sampling))  # type: ignore[arg-type]


OVERLAP = False
"""Whether toy engines plan a step while the one before it is in flight, as they do on a GPU."""


def toy_engine(model: nn.Module | None = None, **settings: object) -> Engine:
    """An engine over a toy model; `settings`: fields of EngineConfig and further arguments of Engine."""
    defaults: dict[str, object] = {"num_pages": 4096, "page_size": 1, "max_rows": 32, "debug": True, "overlap": OVERLAP}
    if "page_size" in settings and "num_pages" not in settings:
        defaults["num_pages"] = 4096 // int(str(settings["page_size"])) + 200
    values = {**defaults, **settings}
    sizes = {field.name: values.pop(field.name) for field in fields(EngineConfig) if field.name in values}
    values.setdefault("detokenize", toy_text)
    return Engine(model or ToyModel(), VOCAB, EngineConfig(**sizes), **values)  # type: ignore[arg-type]


def jumping_clock(seed: int) -> Callable[[], float]:
    """A clock by which a step takes anything up to four milliseconds."""
    rng, now = random.Random(seed), 0.0

    def clock() -> float:
        nonlocal now
        now += rng.uniform(0, 0.004)
        return now

    return clock


def force_preemption(engine: Engine) -> None:
    """Make the newest request step back, as a full cache would."""
    preempt(engine.scheduler, engine.scheduler.active[-1])


def assert_drained(engine: Engine) -> None:
    assert engine.book.available == engine.book.num_pages
    engine.book.check_integrity([])
    assert not engine.has_work


def random_prompt(rng: random.Random, most: int = 40) -> list[int]:
    """A prompt in which tags occur: they must be inert."""
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, most))]
