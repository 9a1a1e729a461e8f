"""Answers of a model that knows the structure of a trajectory: what the tests' server replays."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from megatron_multiverse.curation.chain import cut_chain
from megatron_multiverse.curation.trees import announce, flatten, plain_text, walk
from megatron_multiverse.structure import Block, Parts, render


class Script:
    """A trajectory as a plain chain, and the answers that lead from there back to the trajectory.

    Args:
        parts: the trajectory, blocks nested at most twice.
        kind: what its blocks are called.
    """

    def __init__(self, parts: Parts, kind: str = "subtask") -> None:
        self.parts = parts
        self.kind = kind
        self.text = plain_text(parts)
        self.chain = cut_chain(self.text)
        self._starts = [start for start, _ in self.chain.spans]
        self._cursor = 0
        self._blocks: dict[tuple[int, int], Block] = {}
        self._groups: list[list[str]] = []
        self._steps: list[dict[str, Any]] = []
        self._outline(parts)

    def answer(self, stage: str, task: str) -> str:
        """The answer to a request of the pipeline."""
        if stage == "outline":
            return json.dumps({"steps": self._steps, "groups": []})
        if stage == "groups":
            groups = [
                {"kind": self.kind, "members": [{"step": number, "needs": []} for number in group]}
                for group in self._groups
            ]
            return json.dumps({"steps": [], "groups": groups})
        if stage == "judge":
            return json.dumps({"verdicts": []})
        pieces = re.split(r"^Block \d+, lines (\d+)-(\d+):\n", task, flags=re.MULTILINE)[1:]
        blocks = [
            self._in_form_of(draft, self._blocks[int(first), int(last)])
            for first, last, draft in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
        ]
        return "\n\n".join(render(announce((block,))) for block in blocks)

    def _in_form_of(self, draft: str, block: Block) -> Block:
        """The block without those inner blocks that the pipeline has dropped: their outlines are not in the draft."""
        gone = [k for k, (_, inner) in enumerate(walk((block,))) if f": {inner.outlines[0]}\n" not in draft]
        (left,) = flatten((block,), gone)
        assert isinstance(left, Block)
        return left

    def _line(self) -> int:
        """The line at which the text begins that comes next."""
        return bisect_left(self._starts, self._cursor) + 1

    def _text(self, text: str) -> int:
        line = self._line()
        self._cursor += len(text) + 1
        return line

    def _outline(self, parts: Parts) -> None:
        for part in parts:
            if isinstance(part, str):
                self._steps.append(self._step("Plain text", self._text(part)))
                continue
            first, members = self._line(), []
            for outline, path in zip(part.outlines, part.paths, strict=True):
                number = len(self._steps) + 1
                members.append(str(number))
                line = self._line()
                self._steps.append(self._step(outline, line, self._substeps(path, number)))
            self._groups.append(members)
            self._blocks[first, self._line() - 1] = part

    def _step(self, title: str, line: int, substeps: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        return {"title": title, "first_line": line, "substeps": list(substeps)}

    def _substeps(self, path: Parts, step: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part in path:
            if isinstance(part, str):
                found.append({"title": "Plain text", "first_line": self._text(part)})
                continue
            first, members = self._line(), []
            for outline, inner in zip(part.outlines, part.paths, strict=True):
                members.append(f"{step}.{len(found) + 1}")
                found.append({"title": outline, "first_line": self._line()})
                for text in inner:
                    assert isinstance(text, str), "blocks are nested at most twice"
                    self._text(text)
            self._groups.append(members)
            self._blocks[first, self._line() - 1] = part
        return found if len(found) > 1 else []
