"""What the HTTP process knows of the model: its names, its tokenizer, its chat template."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from megatron_multiverse.data.generation_config import end_ids, sampling_defaults
from megatron_multiverse.data.tokenizers import MultiverseTokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.errors import ApiError, refuse
from megatron_multiverse.structure.trajectory import cut_at_labels

logger = logging.getLogger(__name__)

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Qwen's form, for its vocabulary without a template."""
PLAIN = "{%- for message in messages %}{{ message.content }}{{ '\\n' if not loop.last }}{%- endfor %}"
"""For vocabularies without tokens for turns."""
THREAD_CHARACTERS = 4096
"""Longer texts are tokenized in a thread, so that they do not hold up the streams of others."""


class ServedModel:
    """The model as clients see it.

    Args:
        config: options of the server.
        tokenizer: of the model.

    Raises:
        ConfigError: a chat template or generation_config.json that cannot be read.
    """

    def __init__(self, config: ServerConfig, tokenizer: MultiverseTokenizer) -> None:
        self.name = config.model_name
        self.tokenizer = tokenizer
        self.template = _chat_template(config, tokenizer)
        named = None if config.chat_template is not None else tokenizer.chat_templates.get("tool_use")
        self.tool_template = named or self.template
        """For conversations with tools: as in transformers, the one that the tokenizer has under that name."""
        self.end_ids = end_ids(config.load, tokenizer)
        """Ids that end an answer, beside the tokenizer's own."""
        self.sampling_defaults = _sampling_defaults(config)
        """How answers are drawn where a request does not say, by the names of fields; others are OpenAI's."""

    def check_name(self, name: str | None) -> None:
        """Refuse requests for another model. Clients of Megatron's server, which has no names, say "EMPTY".

        Raises:
            ApiError: 404.
        """
        if name not in (None, "", "EMPTY", self.name):
            raise ApiError(
                404,
                f"no model {name[:80]!r} here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; nothing is added."""
        if sum(map(len, texts)) < THREAD_CHARACTERS:
            return self.tokenizer.tokenize_batch(texts)
        return await asyncio.to_thread(self.tokenizer.tokenize_batch, texts)

    def begin_ids(self, param: str) -> list[int]:
        """The token that begins texts, for a field that asks for it.

        Raises:
            ApiError: 400, the tokenizer has none.
        """
        text = self.tokenizer.special_tokens().get("bos_token")
        if not text:
            raise refuse(param, "the tokenizer has no token that begins a text; leave it out")
        return self.tokenizer.tokenize(text)

    def begun(self, ids: list[int]) -> list[int]:
        """These ids after the token that begins texts, if the tokenizer has one and they do not begin with it."""
        text = self.tokenizer.special_tokens().get("bos_token")
        begin = self.tokenizer.tokenize(text) if text else []
        return ids if ids[: len(begin)] == begin else begin + ids

    async def tokenize_answer(self, text: str) -> list[int]:
        """Ids of text that belongs to an answer: its labels end where tokens end."""
        return list(itertools.chain.from_iterable(await self.tokenize(cut_at_labels(text)))) if text else []

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, tags included."""
        if len(ids) < THREAD_CHARACTERS // 4:
            return self.tokenizer.detokenize(ids)
        return await asyncio.to_thread(self.tokenizer.detokenize, ids)

    def check_ids(self, param: str, ids: Sequence[int]) -> None:
        """Refuse ids that the vocabulary does not have.

        Raises:
            ApiError: 400, naming the first.
        """
        size = self.tokenizer.vocab_size
        for token in ids:
            if not 0 <= token < size:
                raise refuse(param, f"{token} is no token id; the vocabulary has 0 to {size - 1}")

    async def check_prompts(self, param: str, prompts: Sequence[Sequence[int]]) -> None:
        """`check_ids` of several prompts; where they are long in a thread, which lets others go on now and then."""

        def check() -> None:
            for ids in prompts:
                self.check_ids(param, ids)

        await asyncio.to_thread(check) if sum(map(len, prompts)) > THREAD_CHARACTERS else check()

    async def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """A conversation as the text of a prompt.

        Args:
            messages: its turns, as templates take them.
            variables: further names in the template; where `tools` is among them, it is that for tools.

        Raises:
            ApiError: 400, the template does not take these messages.
        """
        template = self.tool_template if "tools" in variables else self.template
        try:
            return await asyncio.to_thread(self.tokenizer.render_conversation, messages, template=template, **variables)
        except Exception as error:
            logger.info("the chat template refused a conversation: %r", error)
            raise refuse("messages", "the chat template of the model does not take this conversation") from error


def _sampling_defaults(config: ServerConfig) -> dict[str, float]:
    advised = sampling_defaults(config.load)
    if config.sampling_defaults == "model":
        logger.info("where requests say nothing of it, answers are drawn with %s", advised or "OpenAI's defaults")
        return advised
    if advised:
        logger.info(
            "generation_config.json of the model names %s, which requests that say nothing of it do not get; "
            "--sampling-defaults model gives it to them",
            advised,
        )
    return {}


def _chat_template(config: ServerConfig, tokenizer: MultiverseTokenizer) -> str:
    if config.chat_template is not None:
        try:
            return config.chat_template.read_text(encoding="utf-8")
        except UnicodeError as error:
            raise ConfigError(f"--chat-template {config.chat_template} is not UTF-8 text") from error
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    is_chatml = "<|im_start|>" in tokenizer.id_to_text
    logger.info("the tokenizer has no chat template: messages become %s", "ChatML" if is_chatml else "plain text")
    return CHATML if is_chatml else PLAIN
