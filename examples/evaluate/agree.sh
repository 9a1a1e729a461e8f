#!/usr/bin/env bash
# Runs one small task through three evaluators against one server with the quickstart's model: tools/evaluate.py, lm-eval
# (completions and chat) and evalscope (chat), greedily. Ends with status 1 where one of them read another text, or graded
# an answer otherwise, than tools/evaluate.py. Some answers are wrong (a gold answer is wrong on purpose), so that agreeing
# means something. lm-eval and evalscope get environments of their own, of exact versions, in the folder given; it can be
# that of examples/serve/try_clients.sh. Installing takes minutes and some 2 GB, further runs one or two minutes.
#
# usage: examples/evaluate/agree.sh FOLDER
set -euo pipefail
folder=$(mkdir -p "${1:?usage: agree.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
here=examples/evaluate
export OMP_NUM_THREADS=1 OPENAI_API_KEY=any HF_HUB_OFFLINE=1

. examples/serve/clients.sh
environment lm-eval 'lm-eval[api]==0.4.13'
environment evalscope 'evalscope[perf]==1.14.1'
results=$folder/agree
rm -rf "$results"
mkdir "$results"

start_server "$results/server.log"

for chat in false true; do
  "$python" tools/evaluate.py --url "$url" --tasks arithmetic --data "arithmetic=$here/arithmetic.jsonl" --chat $chat \
    --thinking none --draw.temperature 0 --draw.max-tokens 900 --output "$results/ours-$chat" > "$results/ours-$chat.log" 2>&1
done

lm_eval() { # KIND PATH NAME [OPTION...]
  "$folder/lm-eval/bin/lm_eval" run --model "$1" --include_path $here --tasks multiverse_arithmetic --log_samples \
    --output_path "$results/$3" --model_args "model=quickstart,base_url=$url$2,num_concurrent=4" "${@:4}" \
    > "$results/$3.log" 2>&1
}
lm_eval local-completions /v1/completions lm-eval-false
lm_eval local-chat-completions /v1/chat/completions lm-eval-true --apply_chat_template

# The questions end with the sentence about thinking, because general_qa takes no notice of a prompt_template. It
# has no metric of equal texts, but Rouge-L's F is 1 where, and only where, both are the same words in order.
"$folder/evalscope/bin/evalscope" eval --model quickstart --eval-type openai_api --api-url "$url/v1" --api-key any \
  --datasets general_qa --eval-batch-size 4 --generation-config '{"temperature": 0, "max_tokens": 900}' \
  --dataset-args "{\"general_qa\": {\"dataset_id\": \"$PWD/$here\", \"subset_list\": [\"arithmetic\"], \
    \"filters\": {\"regex\": {\"regex_pattern\": \"Answer: ([^\\\\n]*)\", \"group_select\": -1}}}}" \
  --work-dir "$results/evalscope" > "$results/evalscope.log" 2>&1

"$python" $here/agree.py "$results"
