#!/usr/bin/env bash
# torch 2.13.0, torchdata 0.11.0: starting to iterate over a DataLoader takes a number from torch's global generator, also
# where nothing is drawn: an explicit sampler, no shuffling, no workers.
#
# Expected: a run that restores the generator's state of step 3 and reads the batches from there on draws what the run
# that was not stopped draws (dropout, say), since reading in a fixed order needs no randomness. At least with
# torchdata's StatefulDataLoader, which is made for resuming in the middle of an epoch.
# Seen: it draws other numbers from the first step on, with both loaders, with and without workers. With a generator of
# the loader's own the two runs are equal. So a resumed run is bit-equal only where each loader has its own generator, or
# where the state is restored after the first batch was asked for.
#
# Exits 0 if it is still so, 1 if not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 torchdata==0.11.0 numpy
cat > "$folder/resume.py" <<'CODE'
import sys
import warnings

import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

warnings.simplefilter("ignore")
ROWS, STOP = list(range(12)), 3


def plain_loader(first, **options):
    return DataLoader(ROWS, batch_size=2, sampler=ROWS[2 * first :], **options)


def stateful_loader(first, **options):
    loader = StatefulDataLoader(ROWS, batch_size=2, shuffle=False, **options)
    if first:
        loader.load_state_dict(STATE)
    return loader


def draws(loader, steps):
    """The rows of each batch, and the number that a model would draw beside it."""
    found = []
    for batch in loader:
        found.append((batch.tolist(), torch.rand(()).item()))
        if len(found) == steps:
            break
    return found


def stopped_and_resumed(make, **options):
    global STATE
    torch.manual_seed(0)
    loader = make(0, **options)
    found = draws(loader, STOP)
    STATE = loader.state_dict() if isinstance(loader, StatefulDataLoader) else None
    generator = torch.get_rng_state()
    torch.manual_seed(1)  # a new process
    torch.set_rng_state(generator)
    return found + draws(make(STOP, **options), 6)


results = {}
for name, make in {"DataLoader": plain_loader, "StatefulDataLoader": stateful_loader}.items():
    for what, options in {
        "no workers": {},
        "two workers": {"num_workers": 2},
        "its own generator": {"generator": torch.Generator().manual_seed(0)},
    }.items():
        torch.manual_seed(0)
        whole = draws(make(0, **options), 6)
        parts = stopped_and_resumed(make, **options)
        same_rows = [a for a, _ in whole] == [a for a, _ in parts]
        same_draws = [b for _, b in whole] == [b for _, b in parts]
        results[name, what] = same_rows, same_draws
        print(f"{name}, {what}: same rows {same_rows}, same draws {same_draws}")
expected = {key: (True, key[1] == "its own generator") for key in results}
sys.exit(0 if results == expected else 1)
CODE
echo "torch 2.13.0, torchdata 0.11.0"
"$folder/env/bin/python" "$folder/resume.py"
