"""What is asked of a model, and what comes back. Providers translate it; nothing else knows a vendor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

Stage = Literal["outline", "groups", "rewrite", "judge"]
STAGES: tuple[Stage, ...] = ("outline", "groups", "rewrite", "judge")
Stop = Literal["end", "max_tokens", "refusal", "context_window"]
Effort = Literal["low", "medium", "high", "xhigh", "max"]


@dataclass(frozen=True)
class Request:
    """One question to a model."""

    stage: Stage
    attempt: int
    """From 1, per sample and stage."""
    system: str
    shared: str
    """The start of the user's turn. Later stages of the sample begin with the same text, so it is worth caching."""
    task: str
    """The rest of the user's turn."""
    max_tokens: int
    """Most tokens of the answer, thinking included."""
    schema: dict[str, Any] | None = None
    """JSON schema of the answer; None for free text."""
    is_cached: bool = False
    """Whether `shared` is marked for the provider's prompt cache."""

    @cached_property
    def key(self) -> str:
        """Hash of all that is asked, and of which attempt it is."""
        asked = {field.name: getattr(self, field.name) for field in fields(self)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Usage:
    """Tokens as the provider bills them."""

    input: int = 0
    """Neither written to nor read from the prompt cache."""
    cache_write: int = 0
    cache_read: int = 0
    output: int = 0
    """Thinking included."""
    thinking: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    text: str
    stop: Stop
    model: str
    usage: Usage
    refusal: str = ""
    """Category and explanation where `stop` is "refusal"."""
    is_batch: bool = False
    """Whether it came by a batch, which is cheaper."""
    raw: dict[str, Any] = field(default_factory=dict)
    """The provider's answer as it was received."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**value, "usage": Usage(**value["usage"])})


@dataclass(frozen=True)
class Failure:
    """No answer: the provider could not be reached, or does not take this request. Nothing was paid."""

    reason: str
    is_final: bool = False
    """Whether asking the same again is useless."""
