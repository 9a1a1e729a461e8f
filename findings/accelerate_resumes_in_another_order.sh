#!/usr/bin/env bash
# accelerate 1.15.0, torchdata 0.11.0 (PyPI), torch 2.13.0 on the CPU (gloo, one and two ranks).
#
# Guess before trying: what save_state() keeps of a shuffled DataLoader is not the order of the epoch that runs.
# Expected: a run that stops in the middle of an epoch and goes on as accelerate's guide has it (save_state; then, in a
#   new process with the same seed, load_state and skip_first_batches for the rest of that epoch, the loader itself for
#   those after it) trains each row once per epoch. use_stateful_dataloader=True needs no skipping.
# Seen: the batches that are skipped are those of another order: on one rank the next epoch's, with several ranks or
#   use_seedable_sampler the first epoch's. Some rows of the epoch are trained twice and as many never; the epochs
#   after it have the orders of others, too. Right is a stop in the first epoch with several ranks or with
#   use_seedable_sampler; but the latter without a stateful loader runs the second epoch in the first one's order again.
#   The number of batches is right, losses look as always, and nothing warns of it.
#   (The tracker knows parts of it: issues 2016, 2823, 3996 and 4195, pull requests 4232 and 4233.)
# Output seen (32 rows; rows that the interrupted epoch trained twice and never; whose order the rest of that epoch and
# those after it have, by the epochs of the run without a stop, "new" if none's):
#   1 rank  epoch 0 default                  twice  6  never  6  orders 1 2 3 new
#   1 rank  epoch 0 use_seedable_sampler     twice  0  never  0  orders 0 0 1 2
#   1 rank  epoch 0 use_stateful_dataloader  twice  6  never  6  orders 1 2 3 new
#   1 rank  epoch 0 both                     twice  0  never  0  orders 0 1 2 3
#   1 rank  epoch 0 seedable and set_epoch   twice  0  never  0  orders 0 1 2 3
#   1 rank  epoch 2 default                  twice  6  never  6  orders 3 new
#   1 rank  epoch 2 use_seedable_sampler     twice  6  never  6  orders 0 0
#   1 rank  epoch 2 use_stateful_dataloader  twice  6  never  6  orders 3 new
#   1 rank  epoch 2 both                     twice  6  never  6  orders 0 1
#   1 rank  epoch 2 seedable and set_epoch   twice  0  never  0  orders 2 3
#   2 ranks epoch 0 default                  twice  0  never  0  orders 0 1 2 3
#   2 ranks epoch 0 use_seedable_sampler     twice  0  never  0  orders 0 0 1 2
#   2 ranks epoch 0 use_stateful_dataloader  twice  0  never  0  orders 0 1 2 3
#   2 ranks epoch 0 both                     twice  0  never  0  orders 0 1 2 3
#   2 ranks epoch 0 seedable and set_epoch   twice  0  never  0  orders 0 1 2 3
#   2 ranks epoch 2 default                  twice  6  never  6  orders 0 1
#   2 ranks epoch 2 use_seedable_sampler     twice  6  never  6  orders 0 0
#   2 ranks epoch 2 use_stateful_dataloader  twice  6  never  6  orders 0 1
#   2 ranks epoch 2 both                     twice  6  never  6  orders 0 1
#   2 ranks epoch 2 seedable and set_epoch   twice  0  never  0  orders 2 3
# use_seedable_sampler=True and set_epoch(epoch) of the loader before each epoch and before skip_first_batches avoid it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 torchdata==0.11.0 numpy \
  2> "$work/errors" || { cat "$work/errors"; exit 1; }
cat > "$work/resume.py" <<'PY'
import json
import os
import sys
from collections import Counter

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

ROWS, BATCH, EPOCHS = 32, 2, 4
KINDS = {
    "default": {},
    "use_seedable_sampler": {"use_seedable_sampler": True},
    "use_stateful_dataloader": {"use_stateful_dataloader": True},
    "both": {"use_seedable_sampler": True, "use_stateful_dataloader": True},
    "seedable and set_epoch": {"use_seedable_sampler": True},
}
task, folder = sys.argv[1:]


def prepared(kind):
    """A run's accelerator and its loader of shuffled rows, made from the same seed each time."""
    set_seed(7)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**KINDS[kind]))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(torch.arange(float(ROWS)).unsqueeze(1), batch_size=BATCH, shuffle=True)
    _, _, loader = accelerator.prepare(model, optimizer, loader)
    return accelerator, loader


def rows(batch, accelerator):
    return [int(row) for row in accelerator.gather(batch).flatten().tolist()]


def of_epoch(loader, kind, epoch):
    """The loader, told the number of the epoch if `kind` has it so."""
    if kind.endswith("set_epoch"):
        loader.set_epoch(epoch)
    return loader


def train(kind, stop):
    """The batches of each epoch of a run that saves its state after a quarter of epoch `stop` and runs on."""
    accelerator, loader = prepared(kind)
    epochs = []
    for epoch in range(EPOCHS):
        epochs.append([])
        for batch in of_epoch(loader, kind, epoch):
            epochs[-1].append(rows(batch, accelerator))
            if epoch == stop and len(epochs[-1]) == len(loader) // 4:
                accelerator.save_state(f"{folder}/{kind}{stop}")
    return epochs


def resume(kind, stop, whole):
    """How often the epoch that was interrupted trained rows twice and never, and whose order it and later ones have."""
    accelerator, loader = prepared(kind)
    accelerator.load_state(f"{folder}/{kind}{stop}")
    done = len(loader) // 4
    rest = of_epoch(loader, kind, stop)
    if "use_stateful_dataloader" not in KINDS[kind]:
        rest = accelerator.skip_first_batches(rest, done)
    epochs = [[rows(batch, accelerator) for batch in rest]]
    for epoch in range(stop + 1, EPOCHS):
        epochs.append([rows(batch, accelerator) for batch in of_epoch(loader, kind, epoch)])
    seen = Counter(row for batch in whole[stop][:done] + epochs[0] for row in batch)
    orders = []
    for number, epoch in enumerate(epochs):
        same = [str(i) for i in range(EPOCHS) if epoch == (whole[i] if number else whole[i][done:])]
        orders.append(same[0] if same else "new")
    return sum(count > 1 for count in seen.values()), ROWS - len(seen), orders


ranks = int(os.environ.get("WORLD_SIZE", 1))
path, as_described = f"{folder}/orders.json", True
if task == "train":
    orders = {f"{kind}{stop}": train(kind, stop) for kind in KINDS for stop in (0, 2)}
    if int(os.environ.get("RANK", 0)) == 0:
        with open(path, "w") as file:
            json.dump(orders, file)
else:
    with open(path) as file:
        orders = json.load(file)
    for stop in (0, 2):
        for kind in KINDS:
            twice, never, found = resume(kind, stop, orders[f"{kind}{stop}"])
            if int(os.environ.get("RANK", 0)) == 0:
                print(
                    f"{ranks} rank{'s' if ranks > 1 else ' '} epoch {stop} {kind:24} twice {twice:2}  never {never:2}  "
                    f"orders {' '.join(found)}"
                )
            told, in_order = kind.endswith("set_epoch"), [str(epoch) for epoch in range(stop, EPOCHS)]
            whole = told or (stop == 0 and (ranks > 1 or "use_seedable_sampler" in KINDS[kind]))
            as_described &= (twice, never) == (0, 0) if whole else twice == never > 2
            as_described &= found == in_order or not told
            as_described &= kind != "use_seedable_sampler" or found[:2] == ["0", "0"]
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.exit(0 if as_described else 1)
PY
export OMP_NUM_THREADS=1
for ranks in 1 2; do
  mkdir "$work/$ranks"
  for task in train resume; do
    if [ "$ranks" = 1 ]; then launch=("$work/venv/bin/python" -W ignore); else
      launch=("$work/venv/bin/torchrun" --standalone --nproc-per-node 2); fi
    "${launch[@]}" "$work/resume.py" "$task" "$work/$ranks" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
  done
done
