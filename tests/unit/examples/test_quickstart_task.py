"""The quickstart's task: right answers, strict structure, exact tokenizer round trip, disjoint splits."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

from megatron_multiverse.structure import TAGS, Block, StructureVocab, parse, parse_text

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from build_tokenizer import build_tokenizer  # noqa: E402
from generate_data import GenerateOptions, generate  # noqa: E402
from task import (  # noqa: E402
    Expression,
    Problem,
    check_answer,
    column_steps,
    render_autoregressive,
    render_parallel,
    sample_problem,
)

STEP = re.compile(
    r"\w+: (\d) ([-+*]) (\d) ([-+]) (\d) = (-?\d+), write (\d), (?:carry|borrow) (\d), left (\d+) [-+*] (\d+)"
)


def problems(count: int, *, max_depth: int = 2, nested_share: float = 0.4) -> list[Problem]:
    rng = random.Random(7)
    return [
        sample_problem(rng, num_expressions=rng.randint(1, 6), max_depth=max_depth, nested_share=nested_share)
        for _ in range(count)
    ]


def evaluate_by_python(problem: Problem) -> dict[str, int]:
    return {name: eval(text) for name, text in (part.split(" = ") for part in str(problem).split("; "))}


def result_of_columns(first: str, steps: list[str]) -> int:
    """Follow the written lines as a reader would, checking each against Python's arithmetic."""
    left, operator, right = re.fullmatch(r"(\d+) ([-+*]) (\d+)", first).groups()
    state, carried, written = (int(left), int(right)), 0, 0
    for place, line in enumerate(steps):
        x, op, y, sign, carry, total, write, next_carry, left, right = STEP.fullmatch(line).groups()
        expected_y = state[1] if operator == "*" else state[1] % 10
        assert (op, int(x), int(y), int(carry)) == (operator, state[0] % 10, expected_y, carried)
        assert eval(f"{x} {op} {y} {sign} {carry}") == int(total)
        direction = -1 if operator == "-" else 1
        assert int(total) == int(write) + direction * 10 * int(next_carry)
        state = (state[0] // 10, state[1] if operator == "*" else state[1] // 10)
        assert state == (int(left), int(right))
        carried, written = int(next_carry), written + int(write) * 10**place
    assert state[0] == 0
    return written + carried * 10 ** len(steps)


@pytest.mark.parametrize("max_depth", [1, 2, 3])
def test_answers_agree_with_python(max_depth: int) -> None:
    for problem in problems(300, max_depth=max_depth, nested_share=0.6):
        expected = evaluate_by_python(problem)
        for _, response in (render_parallel(problem), render_autoregressive(problem)):
            answer = response.rsplit("\n\nAnswer: ", 1)[1]
            assert {name: int(value) for name, value in (p.split(" = ") for p in answer.split("; "))} == expected


def test_every_written_step_is_right() -> None:
    for problem in problems(200, max_depth=3, nested_share=0.6):
        lines = render_autoregressive(problem)[1].splitlines()
        heads = [k for k, line in enumerate(lines) if re.fullmatch(r"[A-H]\d* = \d+ [-+*] \d+", line)]
        assert len(heads) >= len(problem.expressions)
        for head in heads:
            name, first = lines[head].split(" = ")
            end = next(k for k in range(head + 1, len(lines)) if not STEP.fullmatch(lines[k]))
            assert lines[end] == f"{name} = {result_of_columns(first, lines[head + 1 : end])}"


def test_both_renderings_do_the_same_work() -> None:
    for problem in problems(100, max_depth=3, nested_share=0.6):
        parallel, sequential = render_parallel(problem)[1], render_autoregressive(problem)[1]
        steps = [sorted(line for line in text.splitlines() if STEP.fullmatch(line)) for text in (parallel, sequential)]
        assert steps[0] == steps[1]


def test_rows_parse_strictly_and_nest_as_the_problem_does() -> None:
    def depth(parts: tuple[str | Block, ...]) -> int:
        blocks = [part for part in parts if isinstance(part, Block)]
        return max((1 + max(depth(path) for path in block.paths) for block in blocks), default=0)

    for problem in problems(100, max_depth=3, nested_share=0.5):
        parts = parse_text(render_parallel(problem)[1])
        assert depth(parts) == problem.depth
        block = next(part for part in parts if isinstance(part, Block))
        assert len(block.paths) == len(block.outlines) == len(problem.expressions)
        assert not any(isinstance(part, Block) for part in parse_text(render_autoregressive(problem)[1]))


def test_check_answer_takes_only_the_whole_right_answer() -> None:
    problem = Problem((Expression("+", 583, 967), Expression("-", Expression("+", 48, 76), Expression("*", 13, 4))))
    assert str(problem) == "A = 583 + 967; B = (48 + 76) - (13 * 4)"
    _, response = render_parallel(problem)
    assert response.endswith("\n\nAnswer: A = 1550; B = 72")
    assert check_answer(problem, response) and check_answer(problem, response + "\n")
    for wrong in (
        response[:-1],
        response + "0",
        response + "; C = 1",
        response.replace("Answer: ", ""),
        "",
        "Answer: ",
    ):
        assert not check_answer(problem, wrong)


def test_columns_refuse_what_they_cannot_hold() -> None:
    for operator, left, right in (("+", 10000, 1), ("-", 3, 4), ("*", 12, 10)):
        with pytest.raises(ValueError, match=r"cannot work out|one digit"):
            list(column_steps(operator, left, right))


@pytest.mark.parametrize("arguments", [{"num_expressions": 0}, {"num_expressions": 9}, {"max_depth": 4}])
def test_sample_problem_refuses_sizes_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sample_problem(random.Random(0), **({"num_expressions": 2} | arguments))


def test_generated_rows_are_reproducible_and_splits_are_disjoint(tmp_path: Path) -> None:
    common = {"num_rows": 6500, "seed": 3, "min_expressions": 1, "max_expressions": 1, "max_depth": 1}
    generate(GenerateOptions(output=tmp_path / "one", workers=1, **common))
    generate(GenerateOptions(output=tmp_path / "two", workers=2, **common))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    generate(GenerateOptions(output=tmp_path / "held_out", split="held_out", **common))
    train, held_out = (
        {re.match(r"Work out (.*?)\. Think", json.loads(line)["prompt"])[1] for line in path.open()}
        for path in (tmp_path / "one", tmp_path / "held_out")
    )
    assert len(train) > 4000 and len(held_out) > 500
    assert not train & held_out
    rows = [json.loads(line) for line in (tmp_path / "one").open()]
    share = sum("<Parallel>" not in row["response"] for row in rows) / len(rows)
    assert 0.22 < share < 0.28


def test_tokenizer_round_trips_and_splits_numbers_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / "model" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= 320
    first_tag = tokenizer.convert_tokens_to_ids(TAGS[0])
    assert tokenizer.convert_tokens_to_ids(list(TAGS)) == list(range(first_tag, first_tag + 12))
    texts = ["odd: Grüße <Path>\n\n 12 a=B (3) \t\x00 日本"]
    for problem in problems(50, max_depth=3):
        texts += ["".join(render_parallel(problem)), "".join(render_autoregressive(problem))]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    digits = tokenizer("A = 1550", add_special_tokens=False)["input_ids"]
    places = (
        "3\nA = 1550\n</Path>",
        "\n<Conclusion>\nA = 1550; B = 72",
        "Answer: A = 1550; B = 7",
        "1: A = 1550 + 9",
    )
    for place in places:
        assert re.search(
            " ".join(map(str, digits)),
            " ".join(map(str, tokenizer(place, add_special_tokens=False)["input_ids"])),
        )


def test_labels_and_gaps_are_tokens_of_the_grammar() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    vocab = StructureVocab.from_pieces(
        {k: tokenizer.decode([k], skip_special_tokens=False) for k in range(len(tokenizer))},
        eos_id=tokenizer.eos_token_id,
    )
    for problem in problems(30, max_depth=3):
        prompt, response = (tokenizer(text)["input_ids"] for text in render_parallel(problem))
        document = parse(prompt + response, vocab, prompt_length=len(prompt))
        labels = [path.label for depth, block in document.walk() if depth == 1 for path in block.paths]
        assert labels == [f"{k}:" for k in range(1, len(problem.expressions) + 1)]
        for depth, block in document.walk():
            assert all(re.fullmatch(rf"\d(\.\d){{{depth - 1}}}:", path.label) for path in block.paths)
