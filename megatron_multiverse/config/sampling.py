"""What one request asks for: how its answer is drawn, and where it ends. Imports no torch.

Frozen; it checks itself and keeps copies. Tools read it nested (``--sampling.temperature 0.7``).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, SupportsIndex, get_args

from megatron_multiverse.errors import GenerationError

MOST_LOGPROBS = 20
"""Most alternatives that can be asked for beside each token, as in the APIs of the field."""

LEAST_PATH_TOKENS = 2
"""A path needs at least a newline and its `</Path>` after its label."""

OnMalformed = Literal["serial", "error"]
GrammarKind = Literal["json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one answer is drawn, and where it ends.

    A token is drawn in this order: `logit_bias` is added to the logits, the penalties change them, `temperature`
    divides them; of their softmax `min_p` keeps a part, `top_k` a part of that, `top_p` a part of that.
    `inference/step/reference.py` is the same in plain float64.

    Raises:
        GenerationError: a value out of range; the message names the field.
    """

    max_tokens: int = 512
    """Most tokens of the answer, forced ones and all branches included. A fork splits what is left evenly among its
    paths, so that no path depends on how fast its siblings run; what they do not use comes back at the join."""
    max_critical_tokens: int | None = None
    """Most tokens on the longest chain of the answer."""
    branch_max_tokens: int | None = None
    """Most tokens that a path writes after its label, its `</Path>` included; at least 2. Paths that it forks do not
    count, they have the same limit of their own. A path at its limit is closed, and its `finish` is `length`."""
    min_tokens: int = 0
    """The answer does not end before it has so many tokens, those of its paths included: until then no end of the text
    and no stop token is drawn outside of paths, unless the budget is spent."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the most likely tokens alone, so many; 0 is off. Ties at the border stay in."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability; 1 is off. Ties at the border stay in."""
    min_p: float = 0.0
    """Draw from tokens that are at least so likely, as a share of the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens that occur in the prompt or were drawn;
    above 1 repeats less, 1 is off. Penalties count what the next token sees: a path counts its parent's tokens and
    its own, the conclusion those of all paths. Forced tokens do not count, and structure tags are never penalised, or
    each block would make the next one rarer."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens that were drawn; -2 to 2, 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens as often as they were drawn; -2 to 2, 0 is off."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these ids; -100 all but bans a token, 100 all but forces it."""
    seed: int = 0
    """Same seed, prompt and settings: same answer, whatever else runs, up to rounding: products of other
    sizes round differently, which in bf16 often changes which of two nearly equal tokens is drawn, in float64 never in
    practice."""
    n: int = 1
    """Answers to the prompt, which they share in the cache. Each takes a request id of its own."""
    max_concurrent_branches: int | None = None
    """Most branches of the answer that run at once; 1 decodes path after path with the same result."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, outside of paths, wherever they fall on tokens. The tokens of a stop text stay in the
    answer, because the model has read them; `answer_text` leaves the text out."""
    include_stop: bool = False
    """`answer_text` keeps the stop texts; what follows one in its last token is left out all the same."""
    max_paths: int | None = None
    """Goals with more outlines stay plain text, if the engine does not draw the line earlier."""
    max_depth: int | None = None
    """Blocks nested deeper stay plain text, if the engine does not draw the line earlier; 0 forks never."""
    leave_open: bool = False
    """What is open where the answer ends stays open, and no budget is kept for tags that would close it: the answer
    just stops, like that of any other engine. Needs max_depth 0."""
    on_malformed: OnMalformed = "serial"
    """What to do about output that breaks the grammar, has too many paths, is nested too deep, or ends with something
    left open. `serial`: tags out of place go on as plain text, and what is open is closed. `error`: the answer ends
    there with `finish_reason` error, and `Result.error` says where and what was expected."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the answer, outside of paths; like the end-of-document id they are not part of it. Structure
    tags are refused where answers fork: `</Goal>` among them, for example, would end each before its first fork."""
    stop_in_branches: bool = False
    """Stop texts and stop tokens in a path end that path."""
    commit_after: int = 0
    """Take the paths of each block for tries: once so many have succeeded, the paths that have not ended are dropped.
    Their text is cut to their label and closed, their pages come free at once, and the conclusion reads what finished.
    0 is off. Which tries are early is told by their length, not by the clock (`inference/text/trial.py`)."""
    commit_on: str = ""
    """A path succeeds when it writes `</Path>` and its text has this in it; empty for every path that ends. A predicate
    of your own: `Request.accept`."""
    grammar: str = ""
    """What the text must be, as `grammar_kind` says; empty for anything. It holds for what comes after `</Think>`, and
    for the whole answer where that begins neither with `<Think>` nor in a thought that its prompt opened; thinking, its
    blocks included, is free. The answer ends when its grammar is complete, or where the model ends it and the grammar
    allows that; it is cut short by `max_tokens` all the same."""
    grammar_kind: GrammarKind = "json_schema"
    """json_schema: a JSON schema, without blanks between its parts, unless its `x-guidance` says so. regex: a regular
    expression, which the whole text matches. choice: a JSON list of texts. grammar: Lark's or llama.cpp's (GBNF)
    notation. llguidance reads all of them."""
    ignore_eos: bool = False
    """Treat the end-of-document id as text, so that answers get as long as max_tokens."""
    logprobs: int = 0
    """Give so many of the most likely tokens beside each drawn one, with their log-probabilities (at most 20)."""
    prompt_logprobs: int | None = None
    """Give the log-probability of each token of the prompt, and so many of the most likely ones beside it (0: none);
    unset, nothing. The prompt is computed afresh then, whatever the prefix cache has."""

    def __post_init__(self) -> None:
        # One Python type each: a list could change while the request waits, and numpy's integers print otherwise.
        self._set("seed", whole_number("seed", self.seed))
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        self._set("stop_token_ids", tuple(whole_number("stop_token_ids", token) for token in self.stop_token_ids))
        bias = {whole_number("logit_bias", token): float(value) for token, value in self.logit_bias.items()}
        self._set("logit_bias", bias)
        self._check_limits()
        self._check_draw()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_limits(self) -> None:
        refuse_unless(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        refuse_unless(self.commit_after >= 0, f"commit_after must be >= 0 (0 is off), got {self.commit_after}")
        refuse_unless(
            not self.commit_on or self.commit_after > 0, "commit_on says which paths succeed; set commit_after, too"
        )
        known = get_args(OnMalformed)
        refuse_unless(
            self.on_malformed in known, f"on_malformed must be one of {', '.join(known)}, got {self.on_malformed!r}"
        )
        # Of two runs of one answer, one may have dropped a try just before it writes what the other one ends for.
        refuse_unless(
            self.on_malformed == "serial" or self.commit_after == 0,
            "on_malformed error would depend on how soon tries are dropped; leave out commit_after, or on_malformed",
        )
        refuse_unless(
            not self.leave_open or self.max_depth == 0, "leave_open is for answers that never fork; set max_depth 0"
        )
        refuse_unless(
            not self.leave_open or self.on_malformed == "serial",
            "on_malformed error asks for an answer that is closed; leave out leave_open, or on_malformed",
        )
        refuse_unless(self.n >= 1, f"n must be at least 1, got {self.n}")
        alike = self.n > 1 and self.temperature == 0
        refuse_unless(
            not alike, f"n is {self.n} at temperature 0, where all answers are the same; give a temperature above 0"
        )
        empty = not all(isinstance(text, str) and text for text in self.stop)
        refuse_unless(not empty, f"stop takes texts of at least one character, got {list(self.stop)}")
        least = LEAST_PATH_TOKENS
        for name, lowest in (("max_critical_tokens", 1), ("max_concurrent_branches", 1), ("branch_max_tokens", least)):
            value = getattr(self, name)
            message = f"{name} must be at least {lowest}, or unset for no limit, got {value}"
            refuse_unless(value is None or value >= lowest, message)
        for name in ("max_paths", "max_depth"):
            value = getattr(self, name)
            refuse_unless(value is None or value >= 0, f"{name} must not be negative (unset for no limit), got {value}")
        message = f"min_tokens must lie between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}"
        refuse_unless(0 <= self.min_tokens <= self.max_tokens, message)
        for name in ("logprobs", "prompt_logprobs"):
            message = f"{name} must lie between 0 and {MOST_LOGPROBS}, got {getattr(self, name)}"
            refuse_unless(0 <= (getattr(self, name) or 0) <= MOST_LOGPROBS, message)

    def _check_draw(self) -> None:
        refuse_unless(0 <= self.temperature < math.inf, f"temperature must be finite and >= 0, got {self.temperature}")
        refuse_unless(self.top_k >= 0, f"top_k must be >= 0 (0 is off), got {self.top_k}")
        refuse_unless(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        refuse_unless(0 <= self.min_p <= 1, f"min_p must lie in [0, 1], got {self.min_p}")
        penalty = self.repetition_penalty
        refuse_unless(0 < penalty < math.inf, f"repetition_penalty must be finite and > 0 (1 is off), got {penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            refuse_unless(-2 <= getattr(self, name) <= 2, f"{name} must lie in [-2, 2], got {getattr(self, name)}")
        known = get_args(GrammarKind)
        refuse_unless(
            self.grammar_kind in known, f"grammar_kind must be one of {', '.join(known)}, got {self.grammar_kind!r}"
        )
        endless = "ignore_eos" if self.ignore_eos else f"min_tokens {self.min_tokens}" if self.min_tokens else ""
        refuse_unless(not (self.grammar and endless), f"grammar says where the answer ends; leave out {endless}")
        for token, value in self.logit_bias.items():
            refuse_unless(math.isfinite(value), f"logit_bias of id {token} must be a finite number, got {value}")

    @cached_property
    def is_shaped(self) -> bool:
        """Whether every token asks for more than a temperature: another distribution, or other likely tokens."""
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return filtered or self.has_penalties or bool(self.logit_bias or self.grammar) or self.logprobs > 0

    @cached_property
    def has_penalties(self) -> bool:
        """Whether any penalty is on."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def whole_number(name: str, value: SupportsIndex) -> int:
    """`value` as a plain int.

    Raises:
        GenerationError: it is no integer, of Python, numpy or torch; the message says `name`.
    """
    try:
        return int(operator.index(value))
    except TypeError as error:
        raise GenerationError(f"{name} takes whole numbers, got {value!r}") from error


def refuse_unless(condition: bool, message: str) -> None:
    """Raise a GenerationError with this message where the condition does not hold."""
    if not condition:
        raise GenerationError(message)
