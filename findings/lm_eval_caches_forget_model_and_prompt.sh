#!/usr/bin/env bash
# lm-eval 0.4.13 (PyPI).
#
# Expected: --use_cache keeps the answers of "a given (model, task) pair", as its documentation says, and
#   --cache_requests the prompts of a task: another model is asked anew, and prompts of a task file or of data that have
#   changed are made anew. The results show the prompts and the data that the score belongs to.
# Seen: neither looks. The first is keyed by the text and the generation settings alone: a second model with the same path
#   is never asked and gets the first one's score, so of a row of checkpoints all are as good as the first. The second is
#   keyed by the task's name, the number of examples and the tokenizer: after a change of doc_to_text the old prompts are
#   sent while the results name the new template, and after a change of the data the old questions are sent and what
#   comes back is compared with the new gold answers, row by row. Nothing warns.
# Output seen (a model "good" that can add, a model "bad" that always says no; two questions):
#   --use_cache: good 1.0, asked 2; bad 1.0, asked 0; bad without the cache: 0.0, asked 2
#   --cache_requests, before: 1.0, asked ['2 + 2 =', '1 + 3 =']
#   --cache_requests, template 'Think first. {{question}}': 1.0, asked ['2 + 2 =', '1 + 3 =']
#   --cache_requests, data of 9 + 1 and 3 + 4: 0.0, asked ['2 + 2 =', '1 + 3 =']
#   --cache_requests refresh: 1.0, asked ['Think first. 9 + 1 =', 'Think first. 3 + 4 =']
# A path for each model, and --cache_requests refresh after each change, avoid it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet lm-eval==0.4.13 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/caches.py" <<'PY'
import json
import logging
import os
import pathlib
import re
import sys

work = sys.argv[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{work}/hub", "LM_HARNESS_CACHE_PATH": f"{work}/requests"}
import lm_eval  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

logging.disable(logging.WARNING)


class Model(LM):
    """Adds up the two numbers of a question if it can, and remembers what it was asked."""

    def __init__(self, can_add):
        super().__init__()
        self.can_add, self.asked = can_add, []

    def generate_until(self, requests, disable_tqdm=False):
        questions = [request.args[0] for request in requests]
        self.asked += questions
        return [str(sum(map(int, re.findall(r"\d+", text)))) if self.can_add else "no" for text in questions]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def write(template, rows):
    """The task "sums" as files: one line per question, greedy decoding."""
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in rows)
    pathlib.Path(work, "rows.jsonl").write_text("\n".join(lines) + "\n")
    pathlib.Path(work, "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {work}/rows.jsonl}}}}\n"
        f'test_split: test\noutput_type: generate_until\ndoc_to_text: "{template}"\ndoc_to_target: "{{{{answer}}}}"\n'
        'generation_kwargs: {do_sample: false, until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n'
    )


def run(can_add, **settings):
    """The score, what the model was asked, and the template that the results name."""
    model = Model(can_add)
    tasks = TaskManager(include_path=work, include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=["sums"], task_manager=tasks, bootstrap_iters=0, **settings)
    return results["results"]["sums"]["exact_match,none"], model.asked, results["configs"]["sums"]["doc_to_text"]


PLAIN, THINK = "{{question}}", "Think first. {{question}}"
SUMS, OTHERS = [("2 + 2 =", "4"), ("1 + 3 =", "4")], [("9 + 1 =", "10"), ("3 + 4 =", "7")]
QUESTIONS = [question for question, _ in SUMS]
cached, refreshed = {"cache_requests": True}, {"cache_requests": True, "rewrite_requests_cache": True}
write(PLAIN, SUMS)
good, bad, alone = run(True, use_cache=f"{work}/answers"), run(False, use_cache=f"{work}/answers"), run(False)
print(
    f"--use_cache: good {good[0]}, asked {len(good[1])}; bad {bad[0]}, asked {len(bad[1])}; "
    f"bad without the cache: {alone[0]}, asked {len(alone[1])}"
)
as_described = (good[0], bad[0], alone[0]) == (1.0, 1.0, 0.0) and (len(good[1]), len(bad[1]), len(alone[1])) == (2, 0, 2)
before = run(True, **cached)
write(THINK, SUMS)
other_template = run(True, **cached)
write(THINK, OTHERS)
other_data, anew = run(True, **cached), run(True, **refreshed)
print(f"--cache_requests, before: {before[0]}, asked {before[1]}")
print(f"--cache_requests, template '{other_template[2]}': {other_template[0]}, asked {other_template[1]}")
print(f"--cache_requests, data of 9 + 1 and 3 + 4: {other_data[0]}, asked {other_data[1]}")
print(f"--cache_requests refresh: {anew[0]}, asked {anew[1]}")
as_described &= before[:2] == (1.0, QUESTIONS) and other_template == (1.0, QUESTIONS, THINK)
as_described &= other_data[:2] == (0.0, QUESTIONS)
as_described &= anew[:2] == (1.0, [f"Think first. {question}" for question, _ in OTHERS])
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/caches.py" "$work" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
