"""docs/checkpoints.md: its commands run as written, its Python too; commands on large models parse."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.verify import parse_parallel_size
from megatron_multiverse.cli import parse_options
from tests.unit import test_readme
from tests.unit.test_readme import ROOT, checkout, commands, run

TEXT = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
__all__ = ["checkout"]
IN_PROCESS = ("tools/convert_checkpoint.py", "tools/verify_checkpoint.py", "tools/generate.py")


def test_commands_run_in_the_order_written(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [line for line in commands(TEXT) if line.startswith(test_readme.PYTHON)]
    assert len(found) == 9
    monkeypatch.chdir(checkout)
    for command in found:
        script, *words = shlex.split(command)[1:]
        if script in IN_PROCESS:  # nine interpreters would import torch and megatron-core nine times
            monkeypatch.setattr("sys.argv", [script, *words])
            runpy.run_path(script, run_name="__main__")
        else:
            done = run(command, checkout)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    output = capsys.readouterr().out
    assert "Answer: A = 1550; B = 25" in output
    assert output.count("\nEQUAL (") == 2 and "logits   2x2 multiverse equal" in output
    _, config = load_checkpoint(checkout / "runs/checkpoints/tuned")
    assert config.vocab_size == 320


def test_commands_on_large_models_parse() -> None:
    found = [shlex.split(line) for line in commands(TEXT) if line.startswith("python tools/convert_checkpoint.py")]
    assert len(found) == 1
    for words in found:
        config = parse_options(ConvertConfig, words[2:])
        assert config.add_control_tokens and config.tensor_model_parallel_size == 8
    assert parse_parallel_size("2x2") == (2, 2)


def test_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (source,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(source, "docs/checkpoints.md", "exec"), names)
    model = names["model"]
    gradient = model.model.embed_tokens.weight.grad  # type: ignore[attr-defined]
    assert gradient.abs().sum() > 0
