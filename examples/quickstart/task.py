"""The quickstart's task: several calculations at once, worked out column by column, one per path.

A problem names two or more expressions. Each is worked in a path of its own; an expression made of two
sub-expressions works those in a nested block and goes on with their results. Every line of work needs only
the line before it and a small table (digit by digit with a carry), so that a small transformer learns it exactly,
and every answer can be checked. Pure Python: the text side of `megatron_multiverse.structure` draws the tags.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_multiverse.structure import Block, render

NAMES = "ABCDEFGH"
PLACES = ("ones", "tens", "hundreds", "thousands")
PARALLEL_REQUEST = " Think step by step and in parallel before answering."
SEQUENTIAL_REQUEST = " Think step by step before answering."
FORK_LINE = "Let's think in parallel."
HELD_OUT_PERCENT = 10

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Expression:
    """`left operator right`, both sides numbers or both expressions."""

    operator: str
    left: int | Expression
    right: int | Expression

    @property
    def children(self) -> tuple[Expression, ...]:
        """The two sub-expressions, or nothing for plain numbers."""
        return tuple(side for side in (self.left, self.right) if isinstance(side, Expression))

    @property
    def depth(self) -> int:
        """1 for plain numbers, one more for every level of sub-expressions."""
        return 1 + max((child.depth for child in self.children), default=0)

    @property
    def operands(self) -> tuple[int, int]:
        """The numbers that are left to combine once the sub-expressions are known."""
        left, right = (side.value if isinstance(side, Expression) else side for side in (self.left, self.right))
        return left, right

    @property
    def value(self) -> int:
        """The result."""
        left, right = self.operands
        return {"+": left + right, "-": left - right, "*": left * right}[self.operator]

    def __str__(self) -> str:
        sides = (f"({side})" if isinstance(side, Expression) else str(side) for side in (self.left, self.right))
        return f" {self.operator} ".join(sides)


@dataclass(frozen=True)
class Problem:
    """Expressions named A, B, C, ... to be worked out together."""

    expressions: tuple[Expression, ...]

    @property
    def named(self) -> tuple[tuple[str, Expression], ...]:
        """Each expression with its name."""
        return tuple(zip(NAMES, self.expressions, strict=False))

    @property
    def depth(self) -> int:
        """Depth of the deepest expression; also the depth of the blocks in the parallel solution."""
        return max(expression.depth for expression in self.expressions)

    @property
    def answer(self) -> str:
        """The answer line's text, e.g. ``A = 1550; B = 72``."""
        return _results(self.named)

    @property
    def split(self) -> Split:
        """Which split the problem belongs to, by a hash of its text: the splits can never share a problem."""
        digest = hashlib.blake2b(str(self).encode(), digest_size=4).digest()
        return "held_out" if int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT else "train"

    def __str__(self) -> str:
        return "; ".join(f"{name} = {expression}" for name, expression in self.named)


def sample_problem(
    rng: random.Random,
    *,
    num_expressions: int,
    max_depth: int = 2,
    nested_share: float = 0.25,
    exact_depth: bool = False,
    split: Split | None = None,
) -> Problem:
    """Draw a problem.

    Args:
        rng: source of randomness.
        num_expressions: how many expressions, 1 to 8; the quickstart's model is trained on 2 to 8, 2 to 4 at depth 3.
        max_depth: 1 = plain numbers only, 2 = sub-expressions, 3 = sub-expressions of sub-expressions.
        nested_share: probability that an expression has sub-expressions where max_depth allows it.
        exact_depth: draw again until the deepest expression has max_depth.
        split: draw again until the problem belongs to this split.

    Raises:
        ValueError: num_expressions or max_depth out of range.
    """
    if not 1 <= num_expressions <= len(NAMES):
        raise ValueError(f"num_expressions must be 1 to {len(NAMES)}, got {num_expressions}")
    if not 1 <= max_depth <= 3:
        raise ValueError(f"max_depth must be 1, 2 or 3 (results keep to four digits), got {max_depth}")
    if exact_depth and nested_share <= 0 and max_depth > 1:
        raise ValueError(f"exact_depth with max_depth {max_depth} needs nested_share > 0, got {nested_share}")
    while True:
        drawn = (_sample_expression(rng, max_depth, nested_share) for _ in range(num_expressions))
        problem = Problem(tuple(drawn))
        if exact_depth and problem.depth != max_depth:
            continue
        if split is None or problem.split == split:
            return problem


def render_parallel(problem: Problem) -> tuple[str, str]:
    """Prompt and response with one path per expression and nested blocks for sub-expressions."""
    block = _block(problem.named)
    thought = render(("<Think>\n" + FORK_LINE, block, "</Think>"))
    return f"Work out {problem}." + PARALLEL_REQUEST, f"{thought}\n\nAnswer: {problem.answer}"


def render_autoregressive(problem: Problem) -> tuple[str, str]:
    """Prompt and response with the same work, one expression after the other, without blocks."""
    lines = [line for name, expression in problem.named for line in _sequential_lines(name, expression)]
    thought = "\n".join(("<Think>", *lines, "</Think>"))
    return f"Work out {problem}." + SEQUENTIAL_REQUEST, f"{thought}\n\nAnswer: {problem.answer}"


def render_undecided(problem: Problem, *, fork: bool) -> tuple[str, str]:
    """Prompt and response without a request for either way of thinking: the expressions become the paths of one block,
    or are worked out one after the other; what an expression needs is worked out in sequence."""
    works = [(name, expression, "\n".join(_sequential_lines(name, expression))) for name, expression in problem.named]
    parts: list[str | Block] = [work for _, _, work in works]
    if fork:
        outlines = tuple(f"{name} = {expression}" for name, expression, _ in works)
        parts = [FORK_LINE, Block(outlines, tuple((work,) for _, _, work in works), problem.answer)]
    return f"Work out {problem}.", f"{render(('<Think>', *parts, '</Think>'))}\n\nAnswer: {problem.answer}"


def check_answer(problem: Problem, text: str) -> bool:
    """True if the text's last ``Answer:`` line gives exactly the right results and nothing else."""
    head, found, answer = text.rpartition("Answer: ")
    return bool(found) and answer.strip() == problem.answer and (not head or head.endswith("\n"))


def column_steps(operator: str, left: int, right: int) -> Iterator[str]:
    """The lines of work for `left operator right`, from the ones upwards.

    Args:
        operator: "+", "-" (left >= right) or "*" (right one digit).
        left: up to four digits.
        right: up to four digits.

    Raises:
        ValueError: an operand that the columns cannot hold.
    """
    if max(left, right) >= 10 ** len(PLACES) or right < 0 or (operator == "-" and left < right):
        raise ValueError(
            f"cannot work out {left} {operator} {right}: numbers are 0 to 9999 and not less than 0 after -"
        )
    if operator == "*" and right > 9:
        raise ValueError(f"the second factor must be one digit, got {right}")
    carried = 0
    for place in PLACES:
        low_left, low_right = left % 10, right if operator == "*" else right % 10
        total = {"+": low_left + low_right, "-": low_left - low_right, "*": low_left * low_right}[operator]
        total += -carried if operator == "-" else carried
        sign, word = ("-", "borrow") if operator == "-" else ("+", "carry")
        step = f"{place}: {low_left} {operator} {low_right} {sign} {carried} = {total}"
        carried, left = abs(total // 10), left // 10
        right = right if operator == "*" else right // 10
        yield f"{step}, write {total % 10}, {word} {carried}, left {left} {operator} {right}"
        if left == 0 and (operator == "*" or right == 0):
            return


def _results(named: tuple[tuple[str, Expression], ...]) -> str:
    return "; ".join(f"{name} = {expression.value}" for name, expression in named)


def _child_names(name: str, expression: Expression) -> tuple[tuple[str, Expression], ...]:
    return tuple((f"{name}{number}", child) for number, child in enumerate(expression.children, start=1))


def _combining_lines(name: str, expression: Expression) -> list[str]:
    left, right = expression.operands
    steps = column_steps(expression.operator, left, right)
    return [f"{name} = {left} {expression.operator} {right}", *steps, f"{name} = {expression.value}"]


def _sequential_lines(name: str, expression: Expression) -> Iterator[str]:
    if expression.children:
        yield f"{name} = {expression}"
        for child_name, child in _child_names(name, expression):
            yield from _sequential_lines(child_name, child)
    yield from _combining_lines(name, expression)


def _path(name: str, expression: Expression) -> tuple[str | Block, ...]:
    work = "\n".join(_combining_lines(name, expression))
    if not expression.children:
        return (work,)
    return (f"{name} = {expression}\n{FORK_LINE}", _block(_child_names(name, expression)), work)


def _block(named: tuple[tuple[str, Expression], ...]) -> Block:
    return Block(
        outlines=tuple(f"{name} = {expression}" for name, expression in named),
        paths=tuple(_path(name, expression) for name, expression in named),
        conclusion=_results(named),
    )


def _sample_expression(rng: random.Random, max_depth: int, nested_share: float, level: int = 0) -> Expression:
    if max_depth > 1 and rng.random() < nested_share:
        operator = rng.choice("+-")
        sides = [_sample_expression(rng, max_depth - 1, nested_share, level + 1) for _ in range(2)]
        if operator == "-":
            sides.sort(key=lambda side: side.value, reverse=True)
        return Expression(operator, sides[0], sides[1])
    # Deeper numbers are shorter, so that every intermediate result keeps to the four columns.
    operator = rng.choice("+-*")
    left = _sample_number(rng, 4 - level)
    right = rng.randint(2, 9) if operator == "*" else _sample_number(rng, 4 - level)
    if operator == "-":
        left, right = max(left, right), min(left, right)
    return Expression(operator, left, right)


def _sample_number(rng: random.Random, longest: int) -> int:
    digits = rng.randint(2, longest)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)
