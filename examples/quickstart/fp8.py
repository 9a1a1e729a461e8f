"""How far weights in FP8 move what the quickstart's model says, beside how far bf16 does; writes JSON.

An engine with `--engine.quantization fp8` is that of the model whose weights were rounded so, hence one forward pass of
such a model over each answer tells. Over all drawn tokens: `relative` is the distance of the logits from those in
float32, over the spread of those; `largest` the largest difference of a logit; `kl` the mean of that of the next
token's distribution, in nats; `same_best` the share of tokens whose most likely one stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_multiverse.inference import Result
    from megatron_multiverse.structure import StructureVocab

MODEL = Path(__file__).parent / "model"
PRODUCTS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """What is compared."""

    output: Path
    """JSON file for the figures."""
    num_problems: int = 100
    """Fresh held-out problems."""
    seed: int = 5
    """Other seeds give other problems."""


def main() -> None:
    import torch
    from decode import Decoder
    from measure import fresh_problems
    from report import write_report

    from megatron_multiverse.checkpoints.load import load_checkpoint
    from megatron_multiverse.cli import parse_options

    options = parse_options(Fp8Options)
    problems = fresh_problems(options.num_problems, seed=options.seed)
    decoder = Decoder(MODEL)
    answers = decoder.answer(problems, "parallel")
    vocab = decoder.tokenizer.structure_vocab
    reference = drawn_logits(decoder.model, answers.results, vocab)
    report: dict[str, object] = {"problems": len(problems), "drawn_tokens": len(reference)}
    for name, dtype, fp8 in (
        ("bf16", torch.bfloat16, False),
        ("fp8", torch.float32, True),
        ("fp8_bf16", torch.bfloat16, True),
    ):
        model = load_checkpoint(MODEL, dtype=dtype)[0]
        if fp8:
            round_products(model)
        report[name] = distances(drawn_logits(model, answers.results, vocab), reference)
    report["right_answers"] = {
        "float32": answers.accuracy,
        "fp8": Decoder(MODEL, quantization="fp8").answer(problems, "parallel").accuracy,
    }
    write_report(report, options.output)
    print(options.output.read_text(encoding="utf-8"))


def round_products(model: nn.Module) -> None:
    """Give a model the weights that an engine in FP8 has."""
    import torch

    from megatron_multiverse.kernels.fused_linear import dequantize_rows, quantize_rows

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(PRODUCTS):
                weight.copy_(dequantize_rows(*quantize_rows(weight), weight.dtype))


def drawn_logits(model: nn.Module, results: list[Result], vocab: StructureVocab) -> Tensor:
    """Logits [drawn tokens of all answers, vocab] by one forward pass over each answer, in float32."""
    import torch

    from megatron_multiverse.inference import training_row
    from megatron_multiverse.model.attention import LayoutParams

    found = []
    with torch.inference_mode():
        for result in results:
            sample = training_row(result, vocab).sample
            params = LayoutParams.from_labels(torch.from_numpy(sample.layout.r)[None].long(), backend="dense")
            positions = torch.from_numpy(sample.layout.position_ids)[None].long()
            logits = model.eval()(torch.from_numpy(sample.ids)[None], positions, None, packed_seq_params=params)[0]
            parents = [parent for parent, drawn in zip(result.parents, result.sampled, strict=True) if drawn]
            found.append(logits[len(result.prompt_ids) + torch.tensor(parents)].float())
    return torch.cat(found)


def distances(found: Tensor, reference: Tensor) -> dict[str, float]:
    """See the head of this file."""
    logprobs = reference.log_softmax(-1)
    return {
        "relative": float((found - reference).norm() / (reference - reference.mean(1, keepdim=True)).norm()),
        "largest": float((found - reference).abs().max()),
        "kl": float((logprobs.exp() * (logprobs - found.log_softmax(-1))).sum(1).mean()),
        "same_best": float((found.argmax(1) == reference.argmax(1)).float().mean()),
    }


if __name__ == "__main__":
    from megatron_multiverse.cli import run_tool

    run_tool(main)
