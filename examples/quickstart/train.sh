#!/usr/bin/env bash
# Retrains examples/quickstart/model from nothing: tokenizer, data, training, weights in bf16. Needs one GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

# CONFIGURATION
PYTHON=${PYTHON:-.venv/bin/python}
RUN=${RUN:-runs/quickstart-train}      # data, checkpoints and metrics; train.yaml names the same folder
NUM_ROWS=${NUM_ROWS:-200000}           # about 140 million tokens, seen almost three times
WORKERS=${WORKERS:-$(nproc)}
MODEL=examples/quickstart/model

"$PYTHON" examples/quickstart/build_tokenizer.py --output "$MODEL"

# write_rows KIND NUM_ROWS SEED OPTIONS...: rows of one kind, for the split of the loop below.
write_rows() {
  "$PYTHON" examples/quickstart/generate_data.py --output "$RUN/rows/${split}_$1.jsonl" --split "$split" \
    --num-rows "$2" --seed "$3" --autoregressive-share 0.25 --workers "$WORKERS" "${@:4}"
}

for split in train held_out; do
  rows=$NUM_ROWS
  if [ "$split" = held_out ]; then rows=2000; fi
  write_rows few $((rows * 60 / 100)) 1 --max-expressions 4
  write_rows many $((rows * 25 / 100)) 2 --max-expressions 8
  write_rows deep $((rows * 15 / 100)) 3 --max-expressions 4 --max-depth 3 --exact-depth
  # The pattern's files are read in the order of their names, so the same rows give the same bytes.
  "$PYTHON" tools/preprocess_data.py --input "$RUN/rows/${split}_*.jsonl" --output-prefix "$RUN/data/$split" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL" --append-eod --workers "$WORKERS"
done

# Further arguments override the configuration, e.g. ./train.sh --train_iters 3000
"$PYTHON" pretrain_scripts/sft_multiverse.py --config examples/quickstart/train.yaml "$@"
rm -rf "$RUN/export"
"$PYTHON" tools/convert_checkpoint.py --from mcore --to hf --load "$RUN/checkpoints/model" --save "$RUN/export" \
  --tokenizer-model "$MODEL" --dtype bf16
cp "$RUN/export"/{config.json,generation_config.json,model.safetensors} "$MODEL"
"$PYTHON" tools/plot_loss.py --runs "$RUN/checkpoints" --output "$MODEL/loss.png" --log-scale true
"$PYTHON" examples/quickstart/accuracy.py --model "$MODEL" --num-problems 1000 --output "$MODEL/accuracy.json"
