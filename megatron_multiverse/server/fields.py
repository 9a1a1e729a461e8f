"""Fields that several routes share: how an answer is drawn, where it ends, and what is special about Multiverse.

The names are those of the clients: OpenAI's, with the extensions of vLLM, SGLang and Megatron. Every field of theirs is
either here, and honoured, or in `refused.py`, and then any value but the neutral ones is an error that names it.
"""

from __future__ import annotations

import secrets
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from megatron_multiverse.config import SamplingParams
from megatron_multiverse.config.sampling import LEAST_PATH_TOKENS, OnMalformed
from megatron_multiverse.errors import GenerationError
from megatron_multiverse.server.body import Fields, check_others
from megatron_multiverse.server.config import LimitConfig
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.grammars import Grammar, grammar_of
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.refused import REFUSED

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
# A prompt can be several kinds of lists. Each that it is not says so at its first entry, not at every one of them: long
# prompts of ids would hold up the streams of others otherwise.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
SeveralIds = Annotated[list[Ids], Field(fail_fast=True)]

GRAMMAR_FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
    "ebnf",
)
"""That say what an answer must be."""


class StreamOptions(Fields):
    """`stream_options`."""

    include_usage: bool | None = None
    """A last chunk without choices says what was used."""
    continuous_usage_stats: bool | None = None
    """vLLM's: with `include_usage`, every chunk says what was used so far."""


class MultiverseFields(Fields):
    """The object `multiverse` of a request. Only clients of this server send it, so an unknown field is a typo."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    enabled: bool = True
    """Whether `</Goal>` forks. If not, the whole answer is one sequence."""
    max_branches: Annotated[int, Field(ge=1)] | None = None
    """Goals with more outlines stay plain text."""
    max_depth: Count | None = None
    """Blocks nested deeper stay plain text."""
    max_concurrent_branches: Annotated[int, Field(ge=1)] | None = None
    """Most branches that run at once; 1 decodes path after path, with the same answer."""
    max_critical_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens on the longest chain."""
    branch_max_tokens: Annotated[int, Field(ge=LEAST_PATH_TOKENS)] | None = None
    """Most tokens that a path writes itself after its label; it is closed then, with finish reason `length`."""
    on_malformed: OnMalformed = "serial"
    """What output that breaks the grammar does: go on as plain text, or end the request with an error."""
    stream_mode: Literal["linear", "branches"] = "linear"
    """How a stream comes: in the order of the text, or as branches write, each piece with the name of its branch."""
    return_tree: bool = False
    """Whether the answer also comes as data: ids, positions, labels, log-probabilities and parents of all tokens."""
    stop_in_branches: bool = False
    """Whether stop texts and stop tokens in a path end that path; else they end the answer, outside of paths alone."""
    commit_after: Count = 0
    """Take the paths of each block for tries: once so many have succeeded, the others are dropped; 0 is off."""
    commit_on: str = ""
    """A try succeeds when it ends and its text has this in it."""
    replay_structure: bool = False
    """Chat: lay out the blocks of earlier answers as they were generated; else their tags are text."""
    answer_start: str = ""
    """Text that the answer begins with. Its tags count: a block's header, up to `</Goal>`, forks."""
    separate_reasoning: bool | None = None
    """Whether the thought, what stands between the Think tags, comes as `reasoning_content` instead of as content; by
    default where a chat has a grammar, which holds for the content."""

    def check(self, *, is_chat: bool, stream: bool) -> None:
        """Refuse what a route cannot serve.

        Args:
            is_chat: whether its prompts hold earlier answers.
            stream: whether the answer is streamed.

        Raises:
            ApiError: 400.
        """
        if self.replay_structure and not is_chat:
            raise refuse("multiverse", "replay_structure reads the earlier answers of a chat; this route has none")
        if self.separate_reasoning and not is_chat:
            raise refuse("multiverse", "separate_reasoning is for chat; this route gives the text as it is")
        if stream and self.commit_after and self.stream_mode == "linear":
            raise refuse("multiverse", "commit_after drops what was streamed; give stream_mode branches, or no stream")


class GenerationFields(Fields):
    """Fields of a route that generates text."""

    is_chat: ClassVar[bool] = False
    """Whether a prompt can hold earlier answers."""
    takes_defaults: ClassVar[bool] = True
    """Whether what a request does not say is drawn as the model's generation_config.json says, if the server is to."""
    model: str | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    """vLLM's: whether the stop text that ends an answer or a path stays in its text."""
    no_stop_trim: bool | None = None
    """SGLang's name for it."""
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    """As in vLLM: requests with a smaller number come first; 0 if it is not given."""
    add_special_tokens: bool | None = None
    """Whether the token that begins texts comes first, where the tokenizer has one; not by itself, as in training."""
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    """Only requests with the same salt, and the same key of the server, share what was computed for their prompts."""
    extra_key: Annotated[str, Field(max_length=256)] | None = None
    """SGLang's: a second salt."""
    response_format: dict[str, Any] | None = None
    """What the answer must be; this and the others of `GRAMMAR_FIELDS` are read by `grammar_of`."""
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    return_token_ids: bool | None = None
    """Whether the ids of the prompt and of the answer come beside the text, where vLLM has them."""
    return_tokens_as_token_ids: bool | None = None
    """Whether log-probabilities name tokens by their ids, as `token_id:5`."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Taken and not used: OpenAI's clients send it for their provider's own watch."""
    multiverse: MultiverseFields | None = None

    @property
    def ours(self) -> MultiverseFields:
        """The object `multiverse`, with its defaults."""
        return self.multiverse or MultiverseFields()

    @cached_property
    def grammar(self) -> Grammar | None:
        """What the answer is held to.

        Raises:
            ApiError: 400, naming the field.
        """
        return grammar_of({name: getattr(self, name) for name in GRAMMAR_FIELDS})

    def grammar_for(self, model: ServedModel) -> Grammar | None:
        """The same, with what a route adds to it.

        Raises:
            ApiError: 400, naming the field.
        """
        return self.grammar

    @property
    def asks_apart(self) -> bool | None:
        """Whether the request says that the thought is to come apart, or that it is not."""
        return self.ours.separate_reasoning

    @property
    def splits_thought(self) -> bool:
        """Whether the thought comes apart from the content."""
        asked = self.asks_apart
        in_order = not self.stream or self.ours.stream_mode == "linear"
        return asked if asked is not None else self.is_chat and self.has_form and in_order

    @property
    def has_form(self) -> bool:
        """Whether what the answer says is more than text, so that a thought does not belong into it."""
        return self.grammar is not None

    @property
    def count(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def salt(self) -> str | None:
        """What tells apart the requests that share nothing; None if nothing does."""
        return joined_salt(self.cache_salt, self.extra_key)

    @property
    def keeps_stop(self) -> bool:
        """Whether stop texts stay in the text."""
        return bool(self.include_stop_str_in_output or self.no_stop_trim)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of it says what was used so far."""
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def check(self, model: ServedModel, limits: LimitConfig) -> None:
        """Refuse what no route can serve.

        Raises:
            ApiError: 400 or 404, naming the field.
        """
        model.check_name(self.model)
        check_others(self, REFUSED)
        self.ours.check(is_chat=self.is_chat, stream=bool(self.stream))
        if self.stream and self.asks_apart and self.ours.stream_mode == "branches":
            raise refuse("multiverse", "separate_reasoning reads the text in its order; give stream_mode linear")
        if self.count > limits.max_n:
            raise refuse("n", f"{self.count} answers asked for, at most {limits.max_n} are allowed")
        if self.stop_token_ids:
            model.check_ids("stop_token_ids", self.stop_token_ids)
            if self.keeps_stop:
                name = "include_stop_str_in_output" if self.include_stop_str_in_output else "no_stop_trim"
                raise refuse(name, "keeps stop texts, not stop tokens; leave out stop_token_ids, or this")

    def stop_texts(self, limits: LimitConfig) -> list[str]:
        """`stop` as a list.

        Raises:
            ApiError: 400, too many or too long.
        """
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(texts) > limits.max_stop:
            raise refuse("stop", f"{len(texts)} texts, at most {limits.max_stop} are allowed")
        for text in texts:
            if not 1 <= len(text) <= limits.max_stop_characters:
                raise refuse("stop", f"a text of {len(text)} characters; 1 to {limits.max_stop_characters} are allowed")
        return texts

    def _bias(self, model: ServedModel) -> dict[int, float]:
        keys = list(self.logit_bias or {})
        if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in keys):
            raise refuse("logit_bias", 'its names must be token ids, such as "42"')
        model.check_ids("logit_bias", [int(key) for key in keys])
        return {int(key): float(value) for key, value in (self.logit_bias or {}).items()}

    def sampling(
        self,
        model: ServedModel,
        limits: LimitConfig,
        max_tokens: int,
        logprobs: int = 0,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """What to ask of the engine.

        Args:
            model: that is served.
            limits: of the server.
            max_tokens: most tokens of each answer.
            logprobs: alternatives to tell beside each token.
            prompt_logprobs: those beside each token of the prompt; None tells nothing of the prompt.

        Raises:
            ApiError: 400, naming the field.
        """
        defaults = model.sampling_defaults if self.takes_defaults else {}

        def asked(name: str, otherwise: float) -> float:
            value = getattr(self, name)
            return float(defaults.get(name, otherwise) if value is None else value)

        top_p = asked("top_p", 1.0)
        greedy = top_p == 0  # the smallest set of tokens with any probability is the most likely one
        stop_ids = [*(self.stop_token_ids or []), *([] if self.ignore_eos else model.end_ids)]
        grammar_kind, grammar = self.grammar_for(model) or ("json_schema", "")
        return make_sampling(
            self.ours,
            grammar=grammar,
            grammar_kind=grammar_kind,
            max_tokens=max_tokens,
            temperature=0.0 if greedy else asked("temperature", 1.0),
            top_k=max(0, int(asked("top_k", 0))),
            top_p=1.0 if greedy else top_p,
            seed=self.seed,
            stop_token_ids=tuple(stop_ids),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            min_p=asked("min_p", 0.0),
            repetition_penalty=asked("repetition_penalty", 1.0),
            presence_penalty=float(self.presence_penalty or 0),
            frequency_penalty=float(self.frequency_penalty or 0),
            logit_bias=self._bias(model),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=tuple(self.stop_texts(limits)),
            include_stop=self.keeps_stop,
        )


def joined_salt(*salts: str | None) -> str | None:
    """Several salts as one; None where none is given."""
    return None if all(salt is None for salt in salts) else repr(salts)


def make_sampling(ours: MultiverseFields, *, seed: int | None, **values: Any) -> SamplingParams:
    """Parameters of the engine; without a seed every answer is another.

    Args:
        ours: the object `multiverse`.
        seed: of the request.
        values: further parameters.

    Raises:
        ApiError: 400, naming the field.
    """
    for name, is_given in (("on_malformed", ours.on_malformed == "error"), ("answer_start", bool(ours.answer_start))):
        if is_given and not ours.enabled:
            raise refuse(name, "with enabled false no tag means anything; leave one of them out")
    max_depth = ours.max_depth if ours.enabled else 0
    try:
        return SamplingParams(
            seed=secrets.randbits(63) if seed is None else seed,
            max_critical_tokens=ours.max_critical_tokens,
            branch_max_tokens=ours.branch_max_tokens,
            on_malformed=ours.on_malformed,
            max_concurrent_branches=ours.max_concurrent_branches,
            max_paths=ours.max_branches,
            max_depth=max_depth,
            leave_open=max_depth == 0 and ours.on_malformed == "serial",
            stop_in_branches=ours.stop_in_branches,
            commit_after=ours.commit_after,
            commit_on=ours.commit_on,
            **values,
        )
    except GenerationError as error:
        text = str(error)
        raise refuse(text.split()[0], text.partition(" ")[2]) from error
