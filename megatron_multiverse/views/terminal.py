"""Branches growing side by side in a terminal, nested blocks inside their column; plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.inference import IncrementalDetokenizer
from megatron_multiverse.structure import TAGS

if TYPE_CHECKING:
    from rich.console import RenderableType

BORDERS = ("white", "blue", "dark_orange", "green", "magenta")


@dataclass
class _Node:
    """One branch on the screen."""

    name: str
    detokenizer: IncrementalDetokenizer
    items: list[str | list[_Node]] = field(default_factory=list)
    """What it wrote: texts, and between them the blocks it forked."""
    ended: bool = False
    printed: int = 0
    """Lines that are printed already, where the output is not a terminal."""


class LiveBranches:
    """Shows the branches of one request while they are decoded. Pass `on_token` to `Engine.generate`.

    Use as a context manager. In a terminal the branches stand side by side in columns that open at a fork and
    close at a join; if the output is not a terminal, each finished line is printed after the name of its branch.

    Args:
        detokenize: ids -> text, tags kept.
        title: line above the branches, e.g. the prompt.
        output: where to; default standard output.
        refresh_per_second: how often the screen is drawn.
    """

    def __init__(
        self,
        detokenize: Callable[[Sequence[int]], str],
        *,
        title: str = "",
        output: TextIO | None = None,
        refresh_per_second: int = 12,
    ) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ModuleNotFoundError as error:
            raise ConfigError('the live view needs rich: pip install "megatron-multiverse[eval]"') from error
        self._detokenize = detokenize
        self._output = output or sys.stdout
        self._title = title
        self._root = _Node("", IncrementalDetokenizer(detokenize))
        self._nodes: dict[str, _Node] = {"": self._root}
        self._num_tokens = 0
        console = Console(file=self._output)
        self._live = (
            Live(console=console, refresh_per_second=refresh_per_second, get_renderable=self.render)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> LiveBranches:
        if self._live is not None:
            self._live.start()
        elif self._title:
            print(self._title, file=self._output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self._nodes.values():
            if rest := node.detokenizer.finish():  # a character that was cut off
                self._append(node, rest)
        if self._live is not None:
            self._live.stop()
            return
        for node in self._nodes.values():
            self._print_lines(node, final=True)

    def on_token(self, request: int, branch: str, ids: Sequence[int]) -> None:
        """Take what a branch wrote; the engine calls this. `request` is ignored, so show one request at a time."""
        node = self._node(branch)
        text = node.detokenizer.push(ids)
        self._append(node, text)
        if text.endswith("</Path>"):
            self._end(node)
        self._num_tokens += len(ids)
        if self._live is None:
            self._print_lines(node, final=node.ended)

    def render(self) -> RenderableType:
        """The whole screen as it is now."""
        from rich.console import Group
        from rich.text import Text

        head = [Text(self._title, style="bold")] if self._title else []
        running = sum(not node.ended for node in self._nodes.values() if node is not self._root)
        writing = f", {running} branches writing at once" if running > 1 else ""
        foot = Text(f"{self._num_tokens} tokens{writing}", style="dim")
        return Group(*head, *self._body(self._root), foot)

    def _append(self, node: _Node, text: str) -> None:
        if node.items and isinstance(node.items[-1], str):
            node.items[-1] += text
            return
        # The branch writes again, so the paths of the block it forked last are over.
        for child in self._children(node):
            self._end(child)
        node.items.append(text)

    def _end(self, node: _Node) -> None:
        """A path is over, and with it everything that it forked."""
        node.ended = True
        for child in self._children(node):
            self._end(child)

    def _node(self, branch: str) -> _Node:
        node = self._nodes.get(branch)
        if node is not None and (not node.ended or not branch):
            return node
        parent = self._node(branch.rpartition(".")[0])
        node = self._nodes[branch] = _Node(branch, IncrementalDetokenizer(self._detokenize))
        siblings = parent.items[-1] if parent.items and isinstance(parent.items[-1], list) else None
        if siblings is None or any(other.name == branch for other in siblings):
            siblings = []
            parent.items.append(siblings)
        siblings.append(node)
        return node

    def _children(self, node: _Node) -> list[_Node]:
        return node.items[-1] if node.items and isinstance(node.items[-1], list) else []

    def _body(self, node: _Node) -> list[RenderableType]:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for item in node.items:
            if isinstance(item, str):
                text = _without_tags(item)
                if text:
                    parts.append(Text(text))
                continue
            columns = Table.grid(expand=True)
            for _ in item:
                columns.add_column(ratio=1)
            columns.add_row(*(self._panel(child, Panel) for child in item))
            parts.append(columns)
        return parts

    def _panel(self, node: _Node, panel: Any) -> RenderableType:
        from rich.console import Group

        depth = node.name.count(".") + 1
        mark = "✓" if node.ended else "…"
        style = BORDERS[depth % len(BORDERS)]
        result: RenderableType = panel(
            Group(*self._body(node)), title=f"path {node.name} {mark}", border_style=style, padding=(0, 1)
        )
        return result

    def _print_lines(self, node: _Node, *, final: bool) -> None:
        """Print the lines of a branch that are complete and not yet printed."""
        lines = "".join(item if isinstance(item, str) else "\n" for item in node.items).split("\n")
        complete = lines if final else lines[:-1]
        for line in complete[node.printed :]:
            shown = _without_tags(line)
            if shown:
                name = f"path {node.name}" if node.name else "root"
                print(f"{name:<10} | {shown}", file=self._output)
        node.printed = max(node.printed, len(complete))


# What a model writes must not steer the terminal: control characters are shown as their pictures, marks that turn the
# writing direction of all that follows as replacement characters. Arabic and Hebrew need none of these marks.
_SHOWN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN |= {0x7F: "\u2421", ord("\t"): "    "}
_SHOWN |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


def _without_tags(text: str) -> str:
    """The text as a screen can show it, line by line."""
    text = text.translate(_SHOWN)
    for tag in TAGS:
        text = text.replace(tag, "")
    return "\n".join(line for line in text.split("\n") if line.strip())
