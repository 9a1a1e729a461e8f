"""One transformer layer of Qwen2.5-7B's shape under Multiverse attention beside megatron-core's stock layer with plain
causal attention: time and memory of forward and backward, on one GPU, in one run.

The time of our layer includes all that a real model computes once per microbatch for all its layers: tile lists and
rotary table. The stock layer runs with every rotary implementation that megatron-core has; ratios are against its
fastest. A case counts only if a shorter sequence through the same layer agrees with a float32 layer, gradients
included.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import make_r
from benchmarks.kernels.record import Recorder
from benchmarks.kernels.timing import Step, in_turns
from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.config import LayerConfig, ModelConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.gpt import transformer_config
from megatron_multiverse.model.layer_specs import choose_transformer_impl, get_gpt_layer_spec
from megatron_multiverse.model.mcore import ensure_cuda_rng_states
from megatron_multiverse.weight_names import is_extra_state, plain_name

TOLERANCE = {"bf16": 2e-2, "fp8": 2e-1}
"""Allowed relative errors (Frobenius) against float32, of the output and of the gradients of input and weights. In bf16
a wrong mask exceeds this, as `float32_results` checks. In FP8 it might not, but attention is computed in bf16 there."""
TE, BF16 = LayerConfig(transformer_impl="transformer_engine"), torch.bfloat16
MODES = {
    "bf16": TE,
    "bf16, full recompute": dataclasses.replace(TE, recompute_granularity="full"),
    "fp8 tensorwise": dataclasses.replace(TE, fp8="hybrid"),
    "fp8 blockwise": dataclasses.replace(TE, fp8="e4m3", fp8_recipe="blockwise"),
}
STOCK_ROTARY: dict[str, dict[str, bool]] = {
    "TE qkv rope": {"apply_rope_fusion": True, "fused_single_qkv_rope": True},
    "TE rope": {"apply_rope_fusion": True},
    "unfused rope": {},
}
"""megatron-core's settings. The unfused rotation is never the fastest, so it is timed in bf16 only."""


@dataclass
class Options:
    """What to measure."""

    tokens: int = 32768
    """Length of the sequence that is timed."""
    check_tokens: int = 4096
    """Length of the one that is checked."""
    rounds: int = 5
    """How often each case gets its turn."""
    modes: list[str] = field(default_factory=lambda: list(MODES))
    """Any of the modes named in MODES."""
    output: str | None = None
    """Folder; default benchmarks/kernels/results."""
    commit: str | None = None
    """Commit to record; default that of the working tree."""


@dataclass
class Case:
    """A layer and how it is called."""

    name: str
    layout: str
    block: Any
    call: Callable[[Any, Tensor, str], Tensor]
    """(block, hidden [s, 1, hidden_size], layout) -> output."""


def build_block(model: ModelConfig, layers: LayerConfig, spec: Any, dtype: torch.dtype, **settings: Any) -> Any:
    """megatron-core's TransformerBlock of one layer on the GPU, without a final norm."""
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

    impl = choose_transformer_impl(layers, torch.device("cuda"), BF16)
    ensure_cuda_rng_states()
    config = transformer_config(model, dtype, initialize=False, layers=layers, transformer_impl=impl)
    for name, value in settings.items():
        setattr(config, name, value)
    return TransformerBlock(config, TransformerBlockSubmodules(layer_specs=[spec]), post_layer_norm=False).cuda()


def call_ours(block: Any, hidden: Tensor, layout: str, backend: str = "flash4") -> Tensor:
    """Our layer, and for this one layer all that a forward pass computes once: tile lists and rotary table."""
    from megatron_multiverse.model.attention import LayoutParams
    from megatron_multiverse.model.layers import PositionIdRotary

    r = labels(layout, len(hidden))
    ids = torch.arange(len(hidden), device="cuda")[None]  # any ids would do: they change neither work nor memory
    table = PositionIdRotary(block.config.kv_channels, 1e6).table(ids)
    params = LayoutParams.from_labels(r, backend=backend)
    params.rotary_table = table
    out: Tensor = block(hidden, None, packed_seq_params=params)
    return out


def call_stock(block: Any, hidden: Tensor, layout: str) -> Tensor:
    """megatron-core's layer, causal."""
    out: Tensor = block(hidden, None, rotary_pos_emb=stock_angles(len(hidden), block.config.kv_channels))
    return out


_MADE: dict[Any, Tensor] = {}


def labels(layout: str, tokens: int) -> Tensor:
    """r of a layout on the GPU, made once (in training the scan or the loader brings it)."""
    if (layout, tokens) not in _MADE:
        _MADE[layout, tokens] = make_r(layout, tokens, "cuda")
    return _MADE[layout, tokens]


def stock_angles(tokens: int, dim: int) -> Tensor:
    """megatron-core's rotary table, made once (its module caches it)."""
    if tokens not in _MADE:
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        _MADE[tokens] = RotaryEmbedding(dim, 1.0, rotary_base=1_000_000)(tokens)
    return _MADE[tokens]


def weights_of(block: Any) -> dict[str, Tensor]:
    """Parameters by plain name."""
    return {plain_name(n): p for n, p in block.named_parameters() if not is_extra_state(n)}


@torch.no_grad()
def share_weights(block: Any, values: dict[str, Tensor]) -> None:
    """Give a block the weights; the first block that comes draws them."""
    for name, parameter in weights_of(block).items():
        if name not in values:
            generator = torch.Generator("cuda").manual_seed(len(values))
            drawn = torch.randn(parameter.shape, device="cuda", generator=generator)
            if "layernorm" in name:
                drawn = 1 + 0.1 * drawn
            elif parameter.ndim == 1:
                drawn = 0.1 * drawn
            else:  # queries and keys twice as large: attention that looks at few tokens, where masks tell
                drawn *= parameter.shape[1] ** -0.5 * (2 if "linear_qkv" in name else 1)
            values[name] = drawn.to(BF16)
        parameter.copy_(values[name])


def run(case: Case, hidden: Tensor, upstream: Tensor) -> Tensor:
    """Forward and backward; gradients are new tensors each time."""
    for parameter in case.block.parameters():
        parameter.grad = None
    hidden.grad = None
    out = case.call(case.block, hidden, case.layout)
    out.backward(upstream)
    return out.detach()


def results(case: Case, hidden: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and all gradients, float32."""
    out = run(case, hidden, upstream)
    grads = {name: p.grad.float() for name, p in weights_of(case.block).items() if p.grad is not None}
    assert hidden.grad is not None
    return {"output": out.float(), "input": hidden.grad.float()} | grads


def draw(tokens: int, hidden_size: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """Hidden states (with gradient) and the gradient from above."""
    generator = torch.Generator("cuda").manual_seed(1)
    x, y = (torch.randn(tokens, 1, hidden_size, device="cuda", generator=generator).to(BF16) for _ in range(2))
    return x.to(dtype).requires_grad_(), y.to(dtype)


def float32_results(model: ModelConfig, weights: dict[str, Tensor], tokens: int) -> dict[str, dict[str, Tensor]]:
    """What a float32 layer gives under each layout: local spec, dense backend."""
    layers = LayerConfig(transformer_impl="local")
    block = build_block(model, layers, get_gpt_layer_spec("local"), torch.float32)
    share_weights(block, weights)
    found = {}
    for layout in ("causal", "realistic"):
        case = Case("float32", layout, block, lambda b, h, name: call_ours(b, h, name, "dense"))
        found[layout] = results(case, *draw(tokens, model.hidden_size, torch.float32))
    difference = float(
        (found["causal"]["output"] - found["realistic"]["output"]).norm() / found["causal"]["output"].norm()
    )
    print(f"the check can see a wrong mask: outputs of the two layouts differ by {difference:.2f}", flush=True)
    assert difference > TOLERANCE["bf16"], difference
    return found


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative error over output and gradients."""
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)


def make_cases(model: ModelConfig, layers: LayerConfig) -> list[Case]:
    """Stock with each rotary, and ours under both layouts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    cases = []
    for name, settings in STOCK_ROTARY.items():
        if not settings and layers != TE:
            continue
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
        block = build_block(model, layers, spec, BF16, bias_dropout_fusion=True, **settings)
        cases.append(Case(f"stock, {name}", "causal", block, call_stock))
    block = build_block(model, layers, get_gpt_layer_spec("transformer_engine"), BF16)
    return cases + [Case("ours, flash4", layout, block, call_ours) for layout in ("causal", "realistic")]


def peak_memory(case: Case, hidden: Tensor, upstream: Tensor) -> float:
    """Peak GiB of a step: weights, their gradients, input and everything between."""
    run(case, hidden, upstream)
    for parameter in case.block.parameters():
        parameter.grad = None
    hidden.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(case, hidden, upstream)
    own = sum(p.nbytes for p in case.block.parameters()) + hidden.nbytes + upstream.nbytes
    return (torch.cuda.max_memory_allocated() - before + own) / 2**30


def measure(cases: list[Case], hidden: Tensor, upstream: Tensor, rounds: int) -> list[float]:
    """Milliseconds of a step of each case; they take turns."""
    steps = {f"{k}": Step.of(partial(run, case, hidden, upstream)) for k, case in enumerate(cases)}
    return list(in_turns(steps, rounds).values())


def main() -> None:
    """Run all cases."""
    o = parse_options(Options)
    if unknown := [mode for mode in o.modes if mode not in MODES]:
        raise ConfigError(f"modes {unknown} unknown, allowed: {', '.join(MODES)}")
    version = importlib.metadata.version("megatron-core")
    key = ("mode", "layer", "layout", "tokens")
    recorder = Recorder(f"layer_mcore_{version}", o.output, o.commit, key=key)
    model = dataclasses.replace(preset("qwen2.5-7b"), num_layers=1)
    weights: dict[str, Tensor] = {}
    exact: dict[str, dict[str, Tensor]] = {}
    for mode in o.modes:
        run_mode(mode, o, recorder, model, weights, exact)
        gc.collect()
        torch.cuda.empty_cache()
    recorder.table(
        "Forward and backward of one layer; medians of steps taken in turn. Ratios are against the fastest stock layer "
        "(time) and the leanest (memory) of the same mode; ours includes tile lists and rotary table. "
        f"Error: the worst of output and gradients against float32 at {o.check_tokens} tokens."
    )


def run_mode(
    mode: str,
    o: Options,
    recorder: Recorder,
    model: ModelConfig,
    weights: dict[str, Tensor],
    exact: dict[str, dict[str, Tensor]],
) -> None:
    """Check, measure and record the cases of one mode; weights and exact results are made by the first."""
    cases = make_cases(model, MODES[mode])
    for case in cases:
        share_weights(case.block, weights)
    if not exact:
        exact.update(float32_results(model, weights, o.check_tokens))
    tolerance = TOLERANCE["fp8" if mode.startswith("fp8") else "bf16"]
    counted = []
    for case in cases:
        error = worst_error(results(case, *draw(o.check_tokens, model.hidden_size)), exact[case.layout])
        if error < tolerance:
            counted.append((case, error))
        else:
            print(f"NOT COUNTED: {mode}, {case.name}, {case.layout}: error {error:.2e}", flush=True)
    hidden, upstream = draw(o.tokens, model.hidden_size)
    memory = [peak_memory(case, hidden, upstream) for case, _ in counted]
    times = measure([case for case, _ in counted], hidden, upstream, o.rounds)
    record(recorder, mode, counted, times, memory, o.tokens)


def record(
    recorder: Recorder,
    mode: str,
    counted: list[tuple[Case, float]],
    times: list[float],
    memory: list[float],
    tokens: int,
) -> None:
    """Write the rows of one mode."""
    stock = [n for n, (case, _) in enumerate(counted) if case.name.startswith("stock")]
    fastest, leanest = (min((values[n] for n in stock), default=None) for values in (times, memory))
    for n, (case, error) in enumerate(counted):
        recorder.add(
            mode=mode,
            layer=case.name,
            layout=case.layout,
            tokens=tokens,
            ms=times[n],
            time_ratio=times[n] / fastest if fastest else None,
            peak_gib=memory[n],
            memory_ratio=memory[n] / leanest if leanest else None,
            error=error,
        )


if __name__ == "__main__":
    run_tool(main)
