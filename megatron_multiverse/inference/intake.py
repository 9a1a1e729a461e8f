"""Requests on their way in: refused if they could never be served, numbered, and given their state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_multiverse.config.engine import EngineConfig
from megatron_multiverse.errors import ContextError, GenerationError
from megatron_multiverse.inference.text.guide import Grammars, Guide
from megatron_multiverse.inference.text.prompt_scores import PromptScores
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.state import Detokenize, RequestState, TokenCallback, end_ids, new_state
from megatron_multiverse.structure import Event, StructureMachine, StructureVocab, Thought, opens_thought


class Intake:
    """Makes states of requests.

    Args:
        vocab: the ids of the structure tags.
        config: limits of the engine.
        num_pages: pages of its cache.
        max_position: positions the model can take.
        num_ids: ids of the vocabulary; None if nothing says how many.
        detokenize: ids -> text; None if nothing makes text of them.
        grammars: compiles those of requests; None if nothing does.
    """

    def __init__(
        self,
        vocab: StructureVocab,
        config: EngineConfig,
        *,
        num_pages: int,
        max_position: int,
        num_ids: int | None,
        detokenize: Detokenize | None,
        grammars: Grammars | None = None,
    ) -> None:
        self.vocab = vocab
        self.config = config
        self.num_pages, self.page_size = num_pages, config.page_size
        self.max_position = max_position
        self.num_ids = num_ids
        self.detokenize = detokenize
        self.grammars = grammars
        self.next_id = 0
        """Number of the next answer."""

    def take(self, request: Request, on_token: TokenCallback | None) -> list[RequestState]:
        """The states of a request's n answers, numbered in turn.

        Raises:
            GenerationError: see `check`.
        """
        self.check(request)
        first, sampling = self.next_id, request.sampling
        scores = (
            None
            if sampling.prompt_logprobs is None
            else PromptScores([*range(first, first + sampling.n)], len(request.prompt_ids))
        )
        states = []
        for k in range(sampling.n):
            machine = self._machine(request)
            answer = dataclasses.replace(request, sample=request.sample + k) if k else request
            guide = self._guide(request)
            state = new_state(first + k, answer, machine, self.max_position, on_token, self.detokenize, guide)
            state.scores = scores
            states.append(state)
        self.next_id += sampling.n
        return states

    def check(self, request: Request) -> None:
        """Refuse a request that could never be served.

        Raises:
            GenerationError: naming the numbers.
        """
        prompt = len(request.prompt_ids)
        check_length(
            prompt,
            request.sampling.max_tokens,
            max_position=self.max_position,
            num_pages=self.num_pages,
            page_size=self.page_size,
        )
        sampling = request.sampling
        if (sampling.stop or sampling.commit_on or request.accept) and self.detokenize is None:
            raise GenerationError(
                "stop, commit_on and accept read text, which needs the tokenizer: Engine(..., detokenize=...)"
            )
        forks = 0 not in (sampling.max_depth, self.config.max_depth)
        if forks:
            _refuse_stops_of_blocks(sampling.stop)
        # On a GPU an id outside of the embedding is not an exception but the end of the process.
        self._check_ids("prompt token {}", request.prompt_ids)
        self._check_ids("an id of logit_bias", list(request.sampling.logit_bias))
        self._check_ids("a stop token", request.sampling.stop_token_ids)
        for token in request.sampling.stop_token_ids:
            if forks and token in self.vocab.tag_of:
                raise GenerationError(
                    f"stop token {token} is the structure tag {self.vocab.tag_of[token].text}, which the engine reads "
                    "itself; leave it out (max_depth 0 keeps answers from forking)"
                )

        self._check_start(request, prompt)
        if (guide := self._guide(request)) is not None:
            for index, token in enumerate(request.answer_start):
                guide.push(token)
                if guide.error or guide.is_complete:
                    problem = "breaks" if guide.error else "completes"
                    raise GenerationError(f"token {index} of answer_start {problem} the grammar; shorten answer_start")

    def _machine(self, request: Request) -> StructureMachine:
        """The grammar of an answer that has not begun, with the limits of engine and request."""
        machine = StructureMachine(self.vocab, **self.config.limits_of(request.sampling))
        if self._thought(request) == "open":
            machine.begin_in_thought()
        return machine

    def _thought(self, request: Request) -> Thought:
        if request.thought is not None:
            return request.thought
        return "open" if opens_thought(request.prompt_ids, self.vocab) else "none"

    def _guide(self, request: Request) -> Guide | None:
        sampling = request.sampling
        if not sampling.grammar:
            return None
        if self.grammars is None:
            raise GenerationError(
                "a grammar needs the Hugging Face tokenizer of the model: Engine(..., grammars=Grammars(...))"
            )
        ends = end_ids(sampling, self.vocab.eos_id)
        return self.grammars.begin(sampling, ends, self._thought(request))

    def _check_start(self, request: Request, prompt: int) -> None:
        ids, sampling = request.answer_start, request.sampling
        if not ids:
            return
        self._check_ids("token {} of answer_start", ids)
        machine = self._machine(request)
        for index, token in enumerate(ids):
            event, problem = machine.push(token), machine.problem
            if problem is not None:
                raise GenerationError(
                    f"answer_start breaks the grammar at token {index}: found {problem.found}, expected "
                    f"{problem.expected}"
                )
            if event is Event.FORK and index + 1 < len(ids):
                raise GenerationError(
                    f"answer_start goes on after the </Goal> at token {index}, where its paths begin; end it there"
                )
        most = min(sampling.max_tokens, sampling.max_critical_tokens or sampling.max_tokens, self.max_position - prompt)
        needed = len(ids) + (0 if sampling.leave_open else len(machine.closing_ids()))
        if needed > most:
            raise GenerationError(
                f"answer_start, and what closes it, take {needed} tokens; max_tokens, max_critical_tokens and the "
                f"positions of the model leave {most}"
            )

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        """Refuse ids that are not of the vocabulary; `what` says which one it is, with its index at {}."""
        limit = float("inf") if self.num_ids is None else self.num_ids
        if not ids or (min(ids) >= 0 and max(ids) < limit):  # not one by one, of which a prompt has many
            return
        index, token = next((index, token) for index, token in enumerate(ids) if not 0 <= token < limit)
        allowed = f"0 to {limit - 1}" if self.num_ids is not None else "0 and up"
        raise GenerationError(
            f"{what.format(index)} is {token}, the ids of the vocabulary are {allowed}; use the tokenizer of the model"
        )


def check_length(prompt: int, max_tokens: int, *, max_position: int, num_pages: int, page_size: int) -> None:
    """Refuse a request that model or cache could never hold.

    Args:
        prompt: tokens of it.
        max_tokens: that its answer may have.
        max_position: positions the model can take.
        num_pages, page_size: pages of the cache, and the tokens of each.

    Raises:
        ContextError: naming the numbers.
    """
    if prompt >= max_position:
        raise ContextError(
            f"prompt ({prompt} tokens) leaves no room in the {max_position} positions of the model; shorten the prompt"
        )
    capacity = num_pages * page_size
    if prompt + max_tokens > capacity:
        raise ContextError(
            f"prompt ({prompt} tokens) and max_tokens ({max_tokens}) need {prompt + max_tokens} "
            f"cache slots, the engine has {capacity} ({num_pages} pages of {page_size}); "
            f"{'lower max_tokens' if prompt < capacity else 'shorten the prompt'} or raise num_pages"
        )


def _refuse_stops_of_blocks(stop: tuple[str, ...]) -> None:
    """Other engines are told to stop where a block forks and where a path ends; this one would never fork."""
    for text in stop:
        for tag in ("</Goal>", "</Path>"):
            if text.rstrip().endswith(tag):
                raise GenerationError(
                    f"the stop text {text!r} ends in {tag}, at which this engine forks and joins by itself: leave it "
                    "out (max_depth 0 keeps answers from forking)"
                )


def count_ids(vocab_size: int | None, model_rows: int | None) -> int | None:
    """How many ids can occur; None if nothing says so.

    Args:
        vocab_size: ids of the tokenizer.
        model_rows: rows of the model's embedding.

    Raises:
        GenerationError: the tokenizer has more ids than the model.
    """
    if vocab_size is not None and model_rows is not None and vocab_size > model_rows:
        raise GenerationError(
            f"the tokenizer has {vocab_size} ids, the model {model_rows} rows of embeddings; "
            "use the tokenizer of the model"
        )
    return model_rows if vocab_size is None else vocab_size
