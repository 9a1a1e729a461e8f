#!/usr/bin/env bash
# lm-eval 0.4.13 (PyPI).
#
# Expected: with the same seed a question is asked with the same few-shot examples on one GPU as on eight (accelerate
#   launch, where each rank takes every eighth question); only the time differs.
# Seen: each rank draws examples, question by question, from a generator of its own that has the same seed. So a
#   question's examples depend on how many questions its rank had before it: with another number of ranks all but the
#   first have others, and ranks repeat each other's draws, the first question of every rank has the same ones. Scores
#   move with the number of GPUs; two models measured on different numbers were asked different things. Nothing warns.
# Output seen (of 40 questions with 3 examples each):
#   default: 1 rank: 40 as with one rank, 40 different draws; 2 ranks: 1, 20; 8 ranks: 1, 5
#   first_n: 1 rank: 40 as with one rank, 1 different draws; 2 ranks: 40, 1; 8 ranks: 40, 1
# "fewshot_config: {sampler: first_n}", or always the same number of ranks, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'lm-eval[api]==0.4.13' 2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/ranks.py" <<'PY'
import json
import logging
import os
import sys

work = sys.argv[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{work}/hub"}
from lm_eval.api.task import ConfigurableTask  # noqa: E402

logging.disable(logging.WARNING)
QUESTIONS = 40
for name, count in (("test", QUESTIONS), ("train", 400)):
    rows = [{"question": f"{name} {number}", "answer": str(number)} for number in range(count)]
    with open(f"{work}/{name}.json", "w") as file:
        json.dump(rows, file)
TASK = {
    "task": "numbers",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {name: f"{work}/{name}.json" for name in ("test", "train")}},
    "test_split": "test",
    "fewshot_split": "train",
    "num_fewshot": 3,
    "output_type": "generate_until",
    "doc_to_text": "{{question}}:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def examples(ranks, sampler):
    """The examples of each question, as the evaluator builds the requests of each rank."""
    found = {}
    for rank in range(ranks):
        task = ConfigurableTask(config=TASK | {"fewshot_config": {"sampler": sampler}})
        task.set_fewshot_seed(1234)
        task.build_all_requests(rank=rank, world_size=ranks)
        found |= {request.doc_id: request.args[0].rpartition("test ")[0] for request in task.instances}
    assert len(found) == QUESTIONS
    return found


as_described = True
for sampler, wanted in (("default", [(40, 40), (1, 20), (1, 5)]), ("first_n", [(40, 1)] * 3)):
    alone, *others = (examples(ranks, sampler) for ranks in (1, 2, 8))
    seen = []
    for now in (alone, *others):
        seen.append((sum(now[question] == alone[question] for question in alone), len(set(now.values()))))
    (same, draws), two, eight = seen
    print(
        f"{sampler}: 1 rank: {same} as with one rank, {draws} different draws; "
        f"2 ranks: {two[0]}, {two[1]}; 8 ranks: {eight[0]}, {eight[1]}"
    )
    as_described &= seen == wanted
sys.exit(0 if as_described else 1)
PY
"$work/venv/bin/python" -W ignore "$work/ranks.py" "$work" 2> "$work/errors" || { tail -5 "$work/errors"; exit 1; }
