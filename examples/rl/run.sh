#!/usr/bin/env bash
# The whole example: rows, a model that forks now and then, reinforcement learning, what it brought. On one GPU; where
# several are visible, each seed has one of its own.
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

# train SEED DEVICE OVERRIDES...
train() {
  CUDA_VISIBLE_DEVICES=$2 exec "$PYTHON" pretrain_scripts/rl_multiverse.py \
    --config pretrain_scripts/configs/rl_quickstart.yaml --seed "$1" --checkpoint.save "$RUN/seed_$1" "${@:3}"
}
count=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}"

# What is under way saves and stops when this script is stopped or one of the runs fails.
pids=()
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Further arguments override the configuration, e.g. ./run.sh --train_iters 20
models=("$RUN/sft/model") runs=()
for ((first = 1; first <= SEEDS; first += count)); do
  pids=()
  for ((seed = first; seed < first + count && seed <= SEEDS; seed++)); do
    train "$seed" "${devices[seed - first]-}" "$@" &
    pids+=($!)
    models+=("$RUN/seed_$seed/model") runs+=("$RUN/seed_$seed")
  done
  for _ in "${pids[@]}"; do wait -n; done  # whichever ends next, so that a failure is noticed at once
done
pids=()
"$PYTHON" examples/rl/compare.py --models "${models[@]}" --input "$RUN/rows/held_out.jsonl" \
  --output "$RUN/compared.json" --num-problems "$PROBLEMS"
"$PYTHON" tools/plot_rl.py --runs "${runs[@]}" --output "$RUN/rl.png" --smooth 3
