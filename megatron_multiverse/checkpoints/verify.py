"""Proves that two checkpoints are the same model: every tensor bit for bit, the logits on fixed ids, the tokenizers.

The logits of transformers' own model are compared with those of ours, under plain causal attention and under the
Multiverse mask, for all tensor and pipeline parallel sizes that are asked for. How far they may differ follows from
the noise of the model at hand: two ways of computing the same in float32 differ more in one model than in another.
Hugging Face folders are opened as their users do, by AutoTokenizer and AutoModelForCausalLM.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiverse.checkpoints.control_tokens import (
    ControlTokens,
    ControlTokenSource,
    TagRows,
    tokenizer_folder,
)
from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.formats.hf_assets import check_tags, tag_ids
from megatron_multiverse.checkpoints.names.rules import check_divisible, split
from megatron_multiverse.checkpoints.protocols import DTypeName, Source, target_dtype
from megatron_multiverse.checkpoints.reference_logits import (
    MASKS,
    Job,
    fixed_inputs,
    own_logits,
    parallel_logits,
    relative_error,
    transformers_logits,
)
from megatron_multiverse.checkpoints.sources import check_source, open_checkpoint
from megatron_multiverse.config import pad_vocab_size
from megatron_multiverse.config.strict import check_choices
from megatron_multiverse.dtypes import DTYPES
from megatron_multiverse.errors import CheckpointError, ConfigError

Result = dict[str, Any]

NOISE_FACTOR, LEAST_TOLERANCE = 10.0, 1e-6
"""A logit may differ by this many times the model's noise; by LEAST_TOLERANCE where hardly any noise was measured."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare two checkpoints of one model, in any of the formats that can be converted."""

    first: Path
    """The original."""
    second: Path
    """What was made of it."""
    add_control_tokens: bool = False
    """The second was made with --add-control-tokens: expect those rows."""
    tag_rows: TagRows = "auto"
    """The second was made with this --tag-rows."""
    tokenizer_model: str | None = None
    """The second was made with this --tokenizer-model."""
    dtype: DTypeName = "keep"
    """The second was made with this --dtype: expect tensors rounded to it."""
    parallel_sizes: list[str] = field(default_factory=lambda: ["1x1", "2x1", "1x2"])
    """Tensor x pipeline parallel sizes to compute logits with; ranks are processes of this machine."""
    tolerance: float | None = None
    """Largest allowed difference of a logit, relative to the largest logit; default: NOISE_FACTOR times the measured
    noise of the model in float32."""
    no_logits: bool = False
    """Compare tensors only: for models that do not fit into memory in float32."""
    report: Path | None = None
    """Write the figures here as JSON."""
    trust_pickle: bool = False
    """Open checkpoints that contain pickles, which can run any code."""

    def __post_init__(self) -> None:
        check_choices(self, "")
        if not self.add_control_tokens and (self.tag_rows != "auto" or self.tokenizer_model is not None):
            raise ConfigError("--tag-rows and --tokenizer-model have no effect without --add-control-tokens")
        if self.no_logits and self.tolerance is not None:
            raise ConfigError("--tolerance has no effect with --no-logits: leave one of them out")


def verify_checkpoints(options: VerifyOptions) -> Result:
    """Compare; the result is made of JSON values, `equal` says whether everything agreed.

    Raises:
        CheckpointError: a checkpoint cannot be read, or its files are not those that were written.
        ConfigError: a checkpoint describes a model that is not supported, or a parallel size is not TPxPP.
        RankError: a rank that computes logits failed.
    """
    start = time.perf_counter()
    sizes = [parse_parallel_size(text) for text in options.parallel_sizes]
    first, second = (
        open_checkpoint(path, trust_pickle=options.trust_pickle) for path in (options.first, options.second)
    )
    for source in (first, second):
        check_source(source)
    expected: Source = first
    plan: ControlTokens | None = None
    if options.add_control_tokens:
        expected = tagged = ControlTokenSource(first, options.tokenizer_model, options.tag_rows)
        plan = tagged.plan
    tokenizers = compare_tokenizers(first, second, plan)
    config = compare_configs(expected, second)
    tensors = compare_tensors(expected, second, options.dtype) if not config else []
    logits: list[Result] = []
    if not options.no_logits and not config:
        changed = set() if plan is None else set(plan.pieces)
        logits = compare_logits(first, second, sizes, options, changed)
    return {
        "first": str(options.first),
        "second": str(options.second),
        "equal": not config and not tensors and all(row["equal"] for row in [*logits, *tokenizers]),
        "config_differences": config,
        "tensors_compared": 0 if config else sum(len(entry.hf) for entry in second.entries()),
        "tensor_differences": tensors,
        "logits": logits,
        "tokenizers": tokenizers,
        "seconds": round(time.perf_counter() - start, 2),
    }


def parse_parallel_size(text: str) -> tuple[int, int]:
    """ "2x1" -> tensor parallel size 2, pipeline parallel size 1. Raises ConfigError for another form."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"parallel size {text!r} must be TENSORxPIPELINE, e.g. 2x1")
    return int(parts[0]), int(parts[1])


def compare_configs(expected: Source, found: Source) -> dict[str, list[Any]]:
    """Fields of the model's shape that differ, as [expected, found]."""
    mine, theirs = (dataclasses.asdict(source.config) | {"family": source.family.name} for source in (expected, found))
    return {key: [mine[key], theirs[key]] for key in mine if mine[key] != theirs[key]}


def compare_tensors(expected: Source, found: Source, dtype: DTypeName = "keep") -> list[Result]:
    """Tensors that are not equal bit for bit, by their Hugging Face names."""
    differences = []
    for entry in expected.entries():
        want = expected.read(entry).to(target_dtype(expected, entry, dtype))
        got = found.read(entry)
        if want.dtype == got.dtype and same_bits(want, got):
            continue
        pairs = zip(entry.hf, split(entry, want, expected.config), split(entry, got, found.config), strict=True)
        differences += [_difference(name, *pair) for (name, _), *pair in pairs]
    return [row for row in differences if row]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype agree in every bit (NaN equals the same NaN, 0 differs from -0)."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def _difference(name: str, want: Tensor, got: Tensor) -> Result:
    if want.dtype != got.dtype:
        return {"tensor": name, "reason": f"dtype {got.dtype}, expected {want.dtype}"}
    if same_bits(want, got):
        return {}
    difference = (want.double() - got.double()).abs()
    values = int((difference != 0).sum())
    return {
        "tensor": name,
        "reason": f"{values} of {want.numel()} values differ" if values else "only the signs of zeros or NaNs differ",
        "max_abs_difference": float(difference.max()),
        "first_row": int(difference.reshape(len(difference), -1).amax(1).gt(0).int().argmax()),
    }


def compare_tokenizers(first: Source, second: Source, plan: ControlTokens | None) -> list[Result]:
    """Open the tokenizers of Hugging Face folders with transformers: every tag must be one token, of the same id.

    Args:
        first: the original.
        second: what was made of it.
        plan: the tags that were added to the second, if they were.

    Returns:
        For each folder with tags, or that should have them: its name, whether all is well, and what is not.
    """
    before, after = (tag_ids(folder) if (folder := tokenizer_folder(s)) else {} for s in (first, second))
    wanted = plan.tag_ids if plan is not None else before or after
    results = []
    for source, found, ids in ((first, before, before), (second, after, wanted)):
        if not is_hf(source) or not ids:
            continue
        problem = "its tokenizer does not have all of the tags" if not found else None
        try:
            if found:
                check_tags(source.folder, ids)
        except CheckpointError as error:
            problem = str(error)
        results.append({"folder": str(source.folder), "equal": problem is None, "problem": problem})
    return results


def compare_logits(
    first: Source, second: Source, sizes: Sequence[tuple[int, int]], options: VerifyOptions, changed: set[int]
) -> list[Result]:
    """Logits at all parallel sizes against transformers, or our own model where neither checkpoint is Hugging Face's.

    Args:
        first: the original.
        second: what was made of it.
        sizes: (tensor, pipeline) parallel sizes.
        options: tolerance and the like.
        changed: ids whose rows differ on purpose.

    Raises:
        CheckpointError: the model can be cut in none of these ways.
    """
    reference, tested = (second, first) if is_hf(second) and not is_hf(first) else (first, second)
    rows = min(first.config.vocab_size, second.config.vocab_size)
    kept = [token for token in range(rows) if token not in changed]
    inputs = fixed_inputs(kept)
    if is_hf(reference):
        rounded = DTYPES[options.dtype] if reference is first and options.dtype != "keep" else None
        by, (wanted, noise) = "transformers", transformers_logits(reference.folder, inputs, rounded)
    else:
        by, (wanted, noise) = "1x1", own_logits(reference.folder, inputs, options.trust_pickle)
    tolerance = options.tolerance if options.tolerance is not None else max(NOISE_FACTOR * noise, LEAST_TOLERANCE)
    impossible = {size: reason for size in sizes if (reason := _impossible(tested, *size))}
    jobs = [Job(tested.folder, *size, inputs, options.trust_pickle) for size in sizes if size not in impossible]
    results = []
    for job, found in zip(jobs, parallel_logits(jobs), strict=True):
        for mask in MASKS:
            error = relative_error(wanted[mask][..., kept], found[mask][..., kept])
            row = {"parallel_size": f"{job.tp}x{job.pp}", "mask": mask, "reference": by, "relative_error": error}
            results.append(row | {"noise": noise, "tolerance": tolerance, "equal": error <= tolerance})
    skipped = [
        {"parallel_size": f"{tp}x{pp}", "mask": "all", "equal": True, "skipped": reason}
        for (tp, pp), reason in impossible.items()
    ]
    if skipped and not results:
        raise CheckpointError(f"none of the parallel sizes is possible: {skipped[0]['skipped']}")
    return results + skipped


def is_hf(source: Source) -> bool:
    """Whether transformers can open the checkpoint."""
    return isinstance(source, HFSource)


def _impossible(source: Source, tp: int, pp: int) -> str | None:
    """Why the model cannot be cut this way, or None."""
    padded = pad_vocab_size(source.config.vocab_size, tp)
    try:
        check_divisible(dataclasses.replace(source.config, vocab_size=padded), tp, pp)
    except ConfigError as error:
        return str(error)
    return None


def report_lines(result: Result) -> Iterator[str]:
    """The result for people."""
    yield f"first    {result['first']}"
    yield f"second   {result['second']}"
    for key, (want, got) in result["config_differences"].items():
        yield f"DIFFERENT {key}: {want} in the first, {got} in the second"
    different = result["tensor_differences"]
    yield f"tensors  {result['tensors_compared']} compared, {len(different)} different"
    for row in different[:20]:
        yield f"DIFFERENT {row['tensor']}: {row['reason']}"
    if len(different) > 20:
        yield f"... and {len(different) - 20} more, see --report"
    for row in result["logits"]:
        if "skipped" in row:
            yield f"logits   {row['parallel_size']} not possible: {row['skipped']}"
        else:
            verdict = "equal" if row["equal"] else "DIFFERENT"
            yield (
                f"logits   {row['parallel_size']} {row['mask']:<10} {verdict}: "
                f"relative error {row['relative_error']:.1e} to {row['reference']} "
                f"(noise {row['noise']:.1e}, allowed {row['tolerance']:.1e})"
            )
    for row in result["tokenizers"]:
        verdict = "equal, every tag is one token" if row["equal"] else f"DIFFERENT: {row['problem']}"
        yield f"tokenizer {row['folder']} {verdict}"
    yield f"{'EQUAL' if result['equal'] else 'DIFFERENT'} ({result['seconds']} s)"
