#!/usr/bin/env bash
# Runs clients of the field, as they are published, against the server with the quickstart's model: lm-eval (completions:
# generation and log-likelihoods; chat), evalscope perf and guidellm (completions and chat). Each gets an environment of
# its own, of the exact version, in the folder given, so that nothing mixes with this project's packages; installing takes
# minutes and some 2 GB, and further runs use what is there. Ends with status 1 where a client saw an error or read another
# answer.
#
# usage: examples/serve/try_clients.sh FOLDER
set -euo pipefail
folder=$(mkdir -p "${1:?usage: try_clients.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
tasks=examples/serve/evaluators
export OMP_NUM_THREADS=1 OPENAI_API_KEY=any HF_HUB_OFFLINE=1

. examples/serve/clients.sh
environment lm-eval 'lm-eval[api]==0.4.13'
environment evalscope 'evalscope[perf]==1.14.1'
environment guidellm 'guidellm==0.8.1'
rm -rf "$folder/results"
mkdir "$folder/results"

start_server "$folder/server.log"

evaluate() { # KIND PATH TASKS [OPTION...]
  "$folder/lm-eval/bin/lm_eval" run --model "$1" --include_path $tasks --tasks "$3" --output_path "$folder/results/$1.json" \
    --model_args "model=quickstart,base_url=$url$2,num_concurrent=2" "${@:4}" > "$folder/results/$1.log" 2>&1
}
evaluate local-completions /v1/completions multiverse_generate,multiverse_score
evaluate local-chat-completions /v1/chat/completions multiverse_generate --apply_chat_template

"$python" -c 'import json, sys; [print(json.loads(line)["prompt"]) for line in sys.stdin]' \
  < $tasks/rows.jsonl > "$folder/results/prompts.txt"
"$folder/evalscope/bin/evalscope" perf --url "$url/v1/chat/completions" --model quickstart --api openai \
  --dataset line_by_line --dataset-path "$folder/results/prompts.txt" --number 6 --parallel 2 --max-tokens 700 \
  --temperature 0 --stream --outputs-dir "$folder/results/evalscope" > "$folder/results/evalscope.log" 2>&1

for kind in completions chat/completions; do
  name=guidellm-${kind%%/*}
  "$folder/guidellm/bin/guidellm" run --backend "kind=openai_http,target=$url,model=quickstart,request_format=/v1/$kind" \
    --profile kind=concurrent,streams=2 --constraint kind=max_requests,count=6 --disable-console-interactive \
    --data kind=json_file,path=$tasks/rows.jsonl --output "kind=json,path=$folder/results/$name.json" \
    > "$folder/results/$name.log" 2>&1
done

"$python" - "$folder/results" << 'END'
import json, pathlib, sys

folder, held = pathlib.Path(sys.argv[1]), True
def read(pattern):
    (file,) = folder.glob(pattern)
    return json.loads(file.read_text())
def say(name, text, good):
    global held
    held = held and good
    print(f"{name}: {text}{'' if good else '  <- wrong'}")
for kind in ("local-completions", "local-chat-completions"):
    for task, row in read(f"{kind}*.json")["results"].items():
        (score,) = (row[name] for name in ("exact_match,answer", "acc,none") if name in row)
        say(f"lm-eval {kind}", f"{task} {score:.3f}", score == 1.0)
row = read("evalscope/**/benchmark_summary.json")
say("evalscope perf", f"{row['Success Requests']} of 6 served", row["Success Requests"] == 6)
for kind in ("completions", "chat"):
    totals = read(f"guidellm-{kind}.json")["benchmarks"][0]["metrics"]["request_totals"]
    say(f"guidellm {kind}", f"{totals['successful']} of {totals['total']} served", 0 < totals["successful"] == totals["total"])
sys.exit(not held)
END
