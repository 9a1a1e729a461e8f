"""Which provider a run asks."""

from __future__ import annotations

from megatron_multiverse.curation.config import CurateConfig
from megatron_multiverse.curation.providers.anthropic_messages import AnthropicProvider
from megatron_multiverse.curation.providers.openai_chat import OpenAIProvider
from megatron_multiverse.curation.providers.protocol import Provider
from megatron_multiverse.curation.providers.rule_based import RuleBasedProvider


def make_provider(config: CurateConfig) -> Provider:
    """The provider that the options name.

    Raises:
        ConfigError: its package or its key is missing.
    """
    if config.dry_run:
        return RuleBasedProvider()
    url, limit, timeout_s = config.base_url, config.concurrency, config.request_timeout
    if config.provider == "openai":
        return OpenAIProvider(config.model, base_url=url, concurrency=limit, timeout_s=timeout_s)
    return AnthropicProvider(
        config.model,
        config.effort,
        base_url=url,
        concurrency=limit,
        timeout_s=timeout_s,
        poll_s=config.poll_interval,
    )
