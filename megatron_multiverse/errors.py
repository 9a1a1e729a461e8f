"""Errors a user can cause. Each message says what was given, what is allowed and what to do next."""

from __future__ import annotations


class MultiverseError(Exception):
    """Base of every error this package raises on purpose."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says; the name of its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class ConfigError(MultiverseError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(MultiverseError, ValueError):
    """Input data that cannot be used; the message names the file and the row."""


class GenerationError(MultiverseError, ValueError):
    """A generation request that cannot be served as asked."""


class ContextError(GenerationError):
    """A request with more tokens than the model or the cache can hold."""


class CheckpointError(MultiverseError, RuntimeError):
    """A checkpoint that is missing, damaged or does not fit the model."""


class RankError(MultiverseError, RuntimeError):
    """A rank that failed, died or did not answer in time."""


class StructureError(MultiverseError, ValueError):
    """Text that breaks the grammar of parallel blocks.

    Attributes:
        code: short stable name of the rule that was broken, e.g. ``"gap"`` or ``"label_order"``.
        sample: name of the sample, if the caller gave one.
        token_index: index of the offending token in the sequence handed to the parser.
        char_index: index of the offending character, if the text is known.
        found: what stands there.
        expected: what the grammar allows there.
    """

    def __init__(
        self,
        code: str,
        *,
        token_index: int,
        found: str,
        expected: str,
        sample: str | None = None,
        char_index: int | None = None,
    ) -> None:
        self.code = code
        self.sample = sample
        self.token_index = token_index
        self.char_index = char_index
        self.found = found
        self.expected = expected
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"token {self.token_index}"
        if self.char_index is not None:
            where += f", character {self.char_index}"
        sample = f"sample {self.sample}: " if self.sample is not None else ""
        return f"{sample}{self.code} at {where}: found {self.found}, expected {self.expected}"

    def __reduce__(self) -> tuple[object, ...]:
        # The default pickling of exceptions calls __init__ with positional arguments only; workers need this.
        return (_rebuild_structure_error, (self.code, dict(self.__dict__)))


def _rebuild_structure_error(code: str, fields: dict[str, object]) -> StructureError:
    error = StructureError(code, token_index=0, found="", expected="")
    error.__dict__.update(fields)
    error.args = (str(error),)
    return error


class TrainingError(MultiverseError, RuntimeError):
    """A training run that must not go on, e.g. because the loss is no longer a number."""
