"""What a chat may ask, beside what all routes that generate text share."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from megatron_multiverse.server.config import LimitConfig
from megatron_multiverse.server.errors import refuse
from megatron_multiverse.server.fields import Count, GenerationFields
from megatron_multiverse.server.grammars import Grammar
from megatron_multiverse.server.messages import Message
from megatron_multiverse.server.model import ServedModel
from megatron_multiverse.server.tool_grammar import call_grammar
from megatron_multiverse.server.tools import NamedChoice, Tool, ToolUse, tool_use


class ChatFields(GenerationFields):
    """Fields of /v1/chat/completions."""

    is_chat = True
    messages: list[Message]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prevent_retokenization: bool | None = None
    return_tokenized_data: bool | None = None
    return_raw_text: bool | None = None
    separate_reasoning: bool | None = None
    """SGLang's name for the field of the object `multiverse`."""
    add_BOS: bool | None = None

    @cached_property
    def tool_use(self) -> ToolUse:
        """The tools, and whether the answer may call them.

        Raises:
            ApiError: 400, naming the field.
        """
        return tool_use(self.tools or [], self.tool_choice, parallel=self.parallel_tool_calls is not False)

    @property
    def asks_apart(self) -> bool | None:
        own = self.ours.separate_reasoning
        return self.separate_reasoning if own is None else own

    @property
    def has_form(self) -> bool:
        return super().has_form or self.tool_use.may_call

    def grammar_for(self, model: ServedModel) -> Grammar | None:
        return call_grammar(self.tool_use, self.grammar, model.tokenizer) if self.tool_use.may_call else self.grammar

    def check(self, model: ServedModel, limits: LimitConfig) -> None:
        super().check(model, limits)
        own = self.ours.separate_reasoning
        if own is not None and self.separate_reasoning not in (None, own):
            raise refuse("separate_reasoning", "contradicts the one of the object multiverse; give one of them")

    def check_tools(self) -> None:
        """Refuse what contradicts that calls are read in what the answer says once it has thought.

        Raises:
            ApiError: 400.
        """
        if not self.tool_use.may_call:
            return
        instead = "or tool_choice none, with which none are read"
        if self.stream and self.ours.stream_mode == "branches":
            raise refuse("tools", f"calls are read in the order of the text; give stream_mode linear, {instead}")
        if self.asks_apart is False:
            raise refuse("tools", f"calls stand after the thought; leave out separate_reasoning false, {instead}")
        if self.logprobs:
            raise refuse("logprobs", f"not of calls, whose text comes in parts; leave it out, {instead}")
