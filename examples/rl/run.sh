#!/usr/bin/env bash
# The whole example on one GPU: rows, a model that forks now and then, reinforcement learning, what it brought.
set -euo pipefail
cd "$(dirname "$0")/../.."

# CONFIGURATION
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-1}                      # runs of reinforcement learning, each with its own seed
PROBLEMS=${PROBLEMS:-100}
RUN=runs/rl                            # the configs name the same folder

"$PYTHON" examples/rl/rows.py --output-dir "$RUN/rows"
"$PYTHON" tools/preprocess_data.py --input "$RUN/rows/sft.jsonl" --output-prefix "$RUN/data/sft" \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model examples/quickstart/model --append-eod --workers "$(nproc)"
"$PYTHON" pretrain_scripts/sft_multiverse.py --config examples/rl/sft.yaml

# Further arguments override the configuration, e.g. ./run.sh --train_iters 20
models=("$RUN/sft/model") runs=()
for seed in $(seq 1 "$SEEDS"); do
  "$PYTHON" pretrain_scripts/rl_multiverse.py --config pretrain_scripts/configs/rl_quickstart.yaml \
    --seed "$seed" --checkpoint.save "$RUN/seed_$seed" "$@"
  models+=("$RUN/seed_$seed/model") runs+=("$RUN/seed_$seed")
done
"$PYTHON" examples/rl/compare.py --models "${models[@]}" --input "$RUN/rows/held_out.jsonl" \
  --output "$RUN/compared.json" --num-problems "$PROBLEMS"
"$PYTHON" tools/plot_rl.py --runs "${runs[@]}" --output "$RUN/rl.png" --smooth 3
