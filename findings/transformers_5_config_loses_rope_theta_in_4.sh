#!/usr/bin/env bash
# transformers 5.23.0 writes, transformers 4.57.1 reads (PyPI).
#
# Expected: a config.json of a Qwen2 model saved by transformers 5 means the same model in 4.57.1, or is refused there.
# Seen: transformers 5 writes the rotary base inside rope_parameters alone; 4.57.1 does not look there and takes the class's
#   default base of 10000 instead of 1000000, without a warning. Such a model answers, worse the longer the text.
# Output seen: written by 5.23.0: rope_parameters {'rope_theta': 1000000.0, 'rope_type': 'default'}, rope_theta absent
#              read by 4.57.1: rope_theta 10000.0
#
# Exits with 0 if the base is lost, with another status if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 5.23.0 4.57.1; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "transformers==$version" 2> "$work/errors" || { cat "$work/errors"; exit 1; }
done
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
"$work/5.23.0/bin/python" - "$work/model" <<'PY'
import json
import sys

from transformers import Qwen2Config

Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}).save_pretrained(sys.argv[1])
written = json.load(open(sys.argv[1] + "/config.json"))
print("written by 5.23.0: rope_parameters", written.get("rope_parameters"), "rope_theta", written.get("rope_theta", "absent"))
PY
"$work/4.57.1/bin/python" - "$work/model" <<'PY'
import sys

from transformers import AutoConfig

theta = AutoConfig.from_pretrained(sys.argv[1]).rope_theta
print("read by 4.57.1: rope_theta", theta)
sys.exit(0 if theta == 10000.0 else 1)
PY
