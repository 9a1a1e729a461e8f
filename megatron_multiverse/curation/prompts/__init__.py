"""The prompts, as files. Their hash is in every output row, so that rows of different wording can be told apart."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import resources

NAMES = ("system", "shared", "outline", "groups", "rewrite", "judge", "retry")


@cache
def _text(name: str) -> str:
    return resources.files(__name__).joinpath(f"{name}.md").read_text(encoding="utf-8").removesuffix("\n")


def fill(name: str, **values: str) -> str:
    """The prompt `name` with its ``{{places}}`` filled in."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], _text(name))


@cache
def prompt_hash() -> str:
    """Twelve hexadecimal digits that change with any word of any prompt."""
    return hashlib.sha256("\0".join(f"{name}\0{_text(name)}" for name in NAMES).encode()).hexdigest()[:12]
