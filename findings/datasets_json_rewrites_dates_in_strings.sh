#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1 (PyPI).
#
# Expected: a string in a JSON Lines file is the same string in the data set. JSON, unlike CSV, says what a string is,
#   and whoever wants to be sure declares the column: features=Features({"answer": Value("string")}).
# Seen: where the strings of a column all look like ISO dates or times, load_dataset makes times of them, in lists and
#   in the arguments of tools, too: "2024-01-05" is a datetime, "2024-01-05T10:00:00+02:00" one of 8 o'clock without a
#   zone. Declaring the column a string does not help: the times are written as text again, in another form. What looks
#   like dates is decided for each piece of 10 MB (chunksize): in a column of strings the dates of those pieces that
#   hold nothing else become "2024-01-05 00:00:00", the same dates in other pieces stay. Nothing warns. A prompt, a
#   label or a gold answer is then another text than in the file; a model's right answer does not match it.
# Output seen (the file's "2024-01-05" as the data set has it):
#   all rows dates:                            datetime.datetime(2024, 1, 5, 0, 0)
#   all rows dates, streaming:                 datetime.datetime(2024, 1, 5, 0, 0)
#   all rows dates, declared a string:         '2024-01-05 00:00:00'
#   one row "unknown":                         '2024-01-05'
#   in the piece of the row "unknown":         '2024-01-05'
#   in a later piece:                          '2024-01-05 00:00:00'
#   an argument of a tool:                     datetime.datetime(2024, 1, 5, 0, 0)
#   "2024-01-05T10:00:00+02:00", declared so:  '2024-01-05 08:00:00'
#   Dataset.from_list of the same rows:        '2024-01-05'
# Reading lines with json.loads and giving the rows to Dataset.from_list, or a Parquet file, avoids it.
#
# Exits with 0 if that is so, with another status if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 2> "$work/errors" \
  || { cat "$work/errors"; exit 1; }
cat > "$work/dates.py" <<'PY'
import datetime
import itertools
import json
import sys

from datasets import Dataset, Features, Value, disable_progress_bars, load_dataset

work = sys.argv[1]
disable_progress_bars()
numbers = itertools.count()
DATE, ZONED, TIME = "2024-01-05", "2024-01-05T10:00:00+02:00", datetime.datetime(2024, 1, 5)


def rows(answer, count=100):
    return [{"question": "When was it?", "answer": answer}] * count


def read(lines, **options):
    name = f"{work}/{next(numbers)}.jsonl"
    with open(name, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return load_dataset("json", data_files=name, split="train", cache_dir=f"{work}/cache", **options)


strings = Features({"question": Value("string"), "answer": Value("string")})
unknown_first = rows("unknown", 1)
pieces = read(unknown_first + rows(DATE), chunksize=2000)
tools = [{"name": "book", "arguments": {"day": DATE}}] * 2
seen = [
    ("all rows dates", read(rows(DATE))[0]["answer"], TIME),
    ("all rows dates, streaming", next(iter(read(rows(DATE), streaming=True)))["answer"], TIME),
    ("all rows dates, declared a string", read(rows(DATE), features=strings)[0]["answer"], "2024-01-05 00:00:00"),
    ('one row "unknown"', read(unknown_first + rows(DATE))[-1]["answer"], DATE),
    ('in the piece of the row "unknown"', pieces[1]["answer"], DATE),
    ("in a later piece", pieces[-1]["answer"], "2024-01-05 00:00:00"),
    ("an argument of a tool", read(tools)[0]["arguments"]["day"], TIME),
    (f'"{ZONED}", declared so', read(rows(ZONED), features=strings)[0]["answer"], "2024-01-05 08:00:00"),
    ("Dataset.from_list of the same rows", Dataset.from_list(rows(DATE))[0]["answer"], DATE),
]
for name, value, _ in seen:
    print(f"{name + ':':42} {value!r}")
sys.exit(0 if all(value == expected for _, value, expected in seen) else 1)
PY
HF_HUB_OFFLINE=1 HF_HOME="$work/home" "$work/venv/bin/python" "$work/dates.py" "$work"
