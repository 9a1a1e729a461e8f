"""The command line: prompts in, text or JSON out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_multiverse.errors import DataError, GenerationError
from megatron_multiverse.inference.generate import GenerateConfig, generate

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples" / "quickstart" / "model"
PROMPT = "Work out A = 914 * 2; B = 1849 + 24. Think step by step and in parallel before answering.\n"


def test_parallel_and_sequential_answers_are_the_same_text():
    options = {"load": MODEL, "prompt": PROMPT, "max_tokens": 600, "device": "cpu"}
    parallel = next(generate(GenerateConfig(**options)))
    sequential = next(generate(GenerateConfig(**options, sequential=True, page_size=1)))
    assert parallel["text"] == sequential["text"]
    assert parallel["prompt"] == PROMPT
    assert parallel["tokens"] <= 600
    assert parallel["text"].count("<Path>") == sum(len(block["branches"]) for block in parallel["blocks"])
    if parallel["blocks"]:
        assert parallel["decode_steps"] < sequential["decode_steps"]
        assert parallel["num_parallel"] > 1


def test_the_tool_reads_and_writes_jsonl(tmp_path):
    rows = [{"prompt": PROMPT}, {"prompt": "Hello"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "tools" / "generate.py", "--load", MODEL, "--max-tokens", "20", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--sequential"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [PROMPT, "Hello"]
    assert all(answer["tokens"] <= 20 for answer in answers)
    refused = subprocess.run([*command, "--prompt", "a", "--num-pages", "1"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1
    assert "cache slots" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("prompts", [{}, {"prompt": "a", "input": Path("b.jsonl")}])
def test_exactly_one_source_of_prompts(prompts):
    with pytest.raises(GenerationError, match="give either --prompt TEXT or --input"):
        next(generate(GenerateConfig(load=MODEL, **prompts)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"question": "b"}\n', "line 2"),
        ("no json\n", "line 1"),
        ("[1]\n", "line 1"),
        ("", "no prompts"),
    ],
)
def test_rows_without_a_prompt_are_named(tmp_path, text, message):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        next(generate(GenerateConfig(load=MODEL, input=tmp_path / "in.jsonl")))


def test_the_chat_template_wraps_the_prompt():
    """The quickstart's tokenizer has none and says so."""
    with pytest.raises(ValueError, match="chat template"):
        next(generate(GenerateConfig(load=MODEL, prompt="a", chat=True)))
