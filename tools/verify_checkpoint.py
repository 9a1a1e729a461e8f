"""Proves that two checkpoints are the same model: tensors bit for bit, logits on fixed ids. Ends with 1 if not.

Example:
    python tools/verify_checkpoint.py HF_FOLDER MCORE_FOLDER --report report.json
"""

from __future__ import annotations

import json
import logging
import sys

from megatron_multiverse.cli import parse_options, run_tool


def main() -> None:
    from megatron_multiverse.checkpoints.verify import VerifyOptions, report_lines, verify_checkpoints

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:]
    if len(arguments) >= 2 and not any(word.startswith("-") for word in arguments[:2]):
        arguments = ["--first", arguments[0], "--second", *arguments[1:]]
    options = parse_options(VerifyOptions, arguments)
    result = verify_checkpoints(options)
    for line in report_lines(result):
        print(line)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result["equal"]:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
