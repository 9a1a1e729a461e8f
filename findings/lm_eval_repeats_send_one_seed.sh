#!/usr/bin/env bash
# lm-eval 0.4.13 (PyPI) against a server with OpenAI's routes that keeps to the seed of a request.
#
# Expected: a task with "repeats: 4" at temperature 1 asks for four draws of each question, so that pass@4, maj@4 or a mean
#   over four answers can be taken of them.
# Seen: every request carries "seed": 1234 (local-completions and local-chat-completions). A server that keeps to seeds
#   gives one answer four times: pass@4 and maj@4 are pass@1. Another seed in model_args (seed=7) is again the same in all
#   requests. Nothing warns, and with a server that takes no notice of seeds the same command draws four answers.
# Output seen:
#   local-completions: 8 requests, seeds {1234}, different answers per question: [1, 1]
#   local-chat-completions: 8 requests, seeds {1234}, different answers per question: [1, 1]
# Several runs with repeats: 1 and another model_args seed=... each draw several answers.
#
# Exits with 0 if all repeats carry one seed, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'lm-eval[api]==0.4.13' 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/drawn.yaml" <<TASK
task: drawn
dataset_path: json
dataset_kwargs: {data_files: {test: $work/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
repeats: 4
generation_kwargs: {do_sample: true, temperature: 1.0, until: ["\n"], max_gen_toks: 8}
filter_list:
  - name: all
    filter: [{function: take_first_k, k: 4}]
metric_list: [{metric: exact_match}]
TASK
printf '%s\n' '{"question": "2 + 2 =", "answer": "4"}' '{"question": "3 + 3 =", "answer": "6"}' > "$work/rows.jsonl"
cat > "$work/run.py" <<'PY'
import json
import logging
import os
import random
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

work = sys.argv[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{work}/hub", "OPENAI_API_KEY": "none"}
seen = []


class Server(BaseHTTPRequestHandler):
    """Answers with a number that the seed draws, as an engine with a seed per request would."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        seen.append(request)
        answer = str(random.Random(request.get("seed")).randrange(10**6))
        choice = {"index": 0, "text": answer, "message": {"role": "assistant", "content": answer}}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

logging.disable(logging.WARNING)
as_described = True
for kind, path in (("local-completions", "completions"), ("local-chat-completions", "chat/completions")):
    seen.clear()
    results = lm_eval.simple_evaluate(
        model=kind,
        model_args=f"model=any,base_url=http://127.0.0.1:{server.server_port}/v1/{path},tokenizer_backend=None,"
        "tokenized_requests=False",
        tasks=["drawn"], task_manager=TaskManager(include_path=work), apply_chat_template="chat" in kind, log_samples=True,
    )  # fmt: skip
    answers = defaultdict(set)
    for sample in results["samples"]["drawn"]:
        answers[sample["doc_id"]].update(sample["resps"][0])
    seeds = {request.get("seed") for request in seen}
    different = [len(found) for found in answers.values()]
    print(f"{kind}: {len(seen)} requests, seeds {seeds}, different answers per question: {different}")
    as_described &= len(seen) == 8 and len(seeds) == 1 and None not in seeds and different == [1, 1]
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/run.py" "$work" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
