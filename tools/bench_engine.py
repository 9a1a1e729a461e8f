"""Times the engine over fixed work, with random weights: no trained model, no tokenizer, no network.

Example:
    python tools/bench_engine.py --model-preset qwen2.5-7b --batch 1 8 32 128
    python tools/bench_engine.py --model-preset qwen2.5-7b --parts prompt fork --fork-prefix 16384
    python tools/bench_engine.py --model-preset qwen2.5-7b --parts joint speedup --batch 1 8 32
    torchrun --nproc-per-node 2 tools/bench_engine.py --model-preset qwen2.5-7b --tensor-model-parallel-size 2

prompt: the time to the first token of a request that is alone. decode: `batch` requests with prompts of `context`
tokens write `new-tokens` each; the figure is the median time between two answers of the engine, everything that a user
waits for included. fork: one request with a long prompt opens a block whose paths write `fork-tokens` each, joins them
and writes a conclusion, as a script says; beside it the same paths one after the other. joint: what fork and join of
that block take beyond the steps in which its tokens are drawn, and where that time goes. speedup: answers of
`answer-tokens` tokens, of which the longest chain has one in `num-parallel`, beside the same answers with one path
after the other; and the law a / num_parallel + b that milliseconds per token follow. Bytes are what a step must read:
all weights but the embedding, and the cached keys and values, those that siblings share once. They are compared with a
plain copy on the same GPU.
"""

from __future__ import annotations

import json

from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    """Print a line per case, and write them if asked to."""
    from megatron_multiverse.inference.bench import BenchConfig, measure
    from megatron_multiverse.inference.build import engine_ranks

    config = parse_options(BenchConfig)
    with engine_ranks(config.tensor_model_parallel_size, 1):
        rows = []
        for row in measure(config):  # on the first rank alone
            rows.append(row)
            if config.output is not None:  # at once: a run that is cut short keeps what it has
                config.output.parent.mkdir(parents=True, exist_ok=True)
                config.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
