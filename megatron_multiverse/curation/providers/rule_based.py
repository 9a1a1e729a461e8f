"""Simple rules in the place of a model, so that pipeline, report and viewer can be tried offline on real text.

The rules know words, not meaning: "Case 1" and "Case 2" begin cases, "Alternatively" begins another try. What they
write is good for looking at, not for training, and every output says so.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import groupby

from megatron_multiverse.curation.exchange import Answer, Failure, Request, Usage
from megatron_multiverse.structure import Tag

_NUMBERED = re.compile(r"^\[(\d+)\] (.*(?:\n(?!\[\d+\] |</text>).*)*)", re.MULTILINE)
_STARTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "text",
        re.compile(r"(?:Put together|Together|Therefore|Thus|Hence|Overall|In total|All\b|The answer|That makes)"),
    ),
    ("case_study", re.compile(r"(?:\*\*)?Case \S+", re.IGNORECASE)),
    ("path_exploration", re.compile(r"(?:Alternatively|Maybe|Another (?:way|approach|idea)|What if)\b", re.IGNORECASE)),
    ("subtask", re.compile(r"(?:First|Second|Third|Next|Then|Finally|Also|\d+[.)])[,\s]", re.IGNORECASE)),
)
_MAX_GROUP = 4
_OUTLINE_LINE = re.compile(r"^(\d+) \(lines \d+-\d+\): (.*)$", re.MULTILINE)
_TITLE_WORDS = 12


@dataclass(frozen=True)
class _Start:
    line: int
    kind: str
    title: str


class RuleBasedProvider:
    """See `protocol.Provider`."""

    label = "rules, for a dry run: not for training"

    async def close(self) -> None:
        """Nothing to let go of."""

    async def count_tokens(self, request: Request) -> None:
        """Nothing is billed."""

    async def complete(self, request: Request) -> Answer | Failure:
        """See `Provider`."""
        write = {"outline": _outline, "groups": _groups, "rewrite": _rewrite, "judge": _judge}[request.stage]
        text = write(request)
        return Answer(text, "end", self.label, Usage(), raw={"text": text})


def _starts(shared: str) -> list[_Start]:
    found = []
    for match in _NUMBERED.finditer(shared):
        line, text = int(match[1]), match[2].strip()
        kind = next((kind for kind, pattern in _STARTS if pattern.match(text)), "")
        if kind or line == 1:
            found.append(_Start(line, kind, " ".join(text.split()[:_TITLE_WORDS])))
    return found


def _outline(request: Request) -> str:
    # The title keeps the kind, so that the next stage finds it in the outline that it is given.
    steps = [
        {"title": f"{start.kind or 'text'}: {_clean(start.title)}", "first_line": start.line, "substeps": []}
        for start in _starts(request.shared)
    ]
    return json.dumps({"steps": steps, "groups": []})


def _clean(title: str) -> str:
    return title.replace("<", "").strip() or "(empty)"


def _groups(request: Request) -> str:
    outline = request.task.partition("<outline>")[2].partition("</outline>")[0]
    steps = [(number, title.partition(":")[0]) for number, title in _OUTLINE_LINE.findall(outline)]
    groups = []
    for kind, run in groupby(steps, key=lambda step: step[1]):
        members = [number for number, _ in run]
        if kind == "text":
            continue
        for k in range(0, len(members), _MAX_GROUP):
            if len(part := members[k : k + _MAX_GROUP]) > 1:
                groups.append({"kind": kind, "members": [{"step": number, "needs": []} for number in part]})
    return json.dumps({"steps": [], "groups": groups})


def _rewrite(request: Request) -> str:
    blocks = re.findall(r"<Parallel>.*?</Parallel>", request.task.partition("<blocks>")[2], flags=re.DOTALL)
    written = []
    for block in blocks:
        block = re.sub(r"(<Path>\n\d+: )(?:Alternatively|Next|Then|Finally|Also|Another),? *", r"\1", block)
        count = block.count(Tag.PATH.text)
        conclusion = f"{Tag.CONCLUSION.text}\n(dry run) The {count} paths above were put side by side by rules.\n"
        block = re.sub(rf"(<Outline>\n\d+: )(?:{'|'.join(kind for kind, _ in _STARTS)}): ", r"\1", block)
        written.append(block.replace(f"{Tag.CONCLUSION.text}\n\n", conclusion))
    return "\n\n".join(written)


def _judge(request: Request) -> str:
    return json.dumps({"verdicts": []})
