"""The options of tools/curate_data.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_multiverse.config import TokenizerType
from megatron_multiverse.curation.exchange import Effort
from megatron_multiverse.curation.rules import FailedBlocks, Independence, LosingBlocks
from megatron_multiverse.errors import ConfigError

ProviderName = Literal["anthropic", "openai"]


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Turn sequential reasoning chains into checked parallel training data, with a language model.

    Each chain is outlined, its independent steps are found and put into blocks, and the paths of the blocks are
    rewritten so that each stands alone. OUTPUT/rows.jsonl is what tools/preprocess_data.py takes; OUTPUT/report.md says
    what was made. A run that was stopped goes on with the same command and pays for no answer twice.
    """

    input: list[str] | str
    """Whatever tools/preprocess_data.py takes: JSON Lines, Parquet, a folder, a pattern, a Hugging Face name."""
    output: Path
    """Folder of the run: new, or of the same run before it was stopped."""
    model: str = ""
    """Model to ask, e.g. claude-sonnet-5-5; not needed for a dry run."""
    provider: ProviderName = "anthropic"
    """anthropic: the key is in ANTHROPIC_API_KEY. openai: any server that speaks /v1/chat/completions, such as vLLM;
    the key, if it wants one, is in OPENAI_API_KEY."""
    base_url: str | None = None
    """Address of the server, e.g. http://localhost:8000/v1; the default is the vendor's."""
    json_keys: list[str] | None = None
    """One key (chain), two (question chain) or three (question chain answer). Without it the columns of s1K-1.1, or
    prompt and response, are found by name."""
    split: str | None = None
    """Split of a Hugging Face data set, or of a folder whose files are named after splits; train if not given."""
    limit: int | None = None
    """Only the first so many rows."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """HuggingFaceTokenizer or SentencePieceTokenizer; used with tokenizer_model."""
    tokenizer_model: str = ""
    """Tokenizer of the model to be trained, whose tokens decide which blocks pay; without it four characters count as
    one token."""
    effort: Effort = "medium"
    """How much the model may think about an answer."""
    max_attempts: int = 3
    """How often a stage may ask before the sample is set aside."""
    max_distance: float = 0.2
    """Largest Levenshtein distance between the text without structure and the original, as a share of the longer."""
    independence: Independence = "lexical"
    """lexical: paths that lead over from one another, mention one another or use one another's results are sent back.
    judge: a model is asked about the others, too. report: such signs are only listed in the row."""
    min_net_gain: float = 1.0
    """A block stays if its text, written sequentially, takes at least this many times the steps of the block. 0 keeps
    all blocks."""
    losing_blocks: LosingBlocks = "flatten"
    """What becomes of a block that gains less: flatten it to text, or send it back once more for shorter outlines and
    conclusions (shorten) and flatten it if that does not help."""
    failed_blocks: FailedBlocks = "set_aside"
    """What becomes of a sample with a block that could not be rewritten: set_aside, or flatten the block and keep the
    rest."""
    batch: bool = False
    """Use the provider's batches: half the price, answers within a day, usually an hour."""
    cache: bool = True
    """Mark the chain for the provider's prompt cache, so that the second stage reads it at a lower price."""
    concurrency: int = 16
    """Requests at the same time (not with batch)."""
    workers: int = 4
    """Processes that check answers and wait for the disk to take them (not with batch); 0 does it where requests are
    sent."""
    request_timeout: float = 600.0
    """Seconds to wait for an answer."""
    poll_interval: float = 30.0
    """Seconds between two looks at a batch."""
    max_cost_usd: float | None = None
    """Stop before a request that could take the whole run, earlier starts of it included, beyond this."""
    prices: Path | None = None
    """Prices in the form of curation/models.json, for other models or days."""
    estimate: bool = False
    """Only say what the run will cost, and stop."""
    yes: bool = False
    """Do not ask for confirmation of the estimated cost."""
    dry_run: bool = False
    """Ask no model: simple rules stand in for it, to try pipeline, report and viewer on your data for nothing. The
    output says so and is not meant for training."""
    retry_set_aside: bool = False
    """Take up again samples that an earlier start has set aside; what was paid for them is used as far as it goes."""
    views: int = 20
    """Write OUTPUT/views/*.html, original beside tree, for the first so many rows."""

    def __post_init__(self) -> None:
        for name, least in (("max_attempts", 1), ("concurrency", 1), ("workers", 0), ("views", 0), ("min_net_gain", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if not 0 <= self.max_distance <= 1:
            raise ConfigError(f"max_distance ({self.max_distance}) must be a share from 0 to 1")
        for name in ("request_timeout", "poll_interval"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be more than 0 seconds")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit ({self.limit}) must be at least 1")
        if self.max_cost_usd is not None and not self.max_cost_usd >= 0:
            raise ConfigError(f"max_cost_usd ({self.max_cost_usd}) must be 0 or more dollars")
        if not self.dry_run and not self.model:
            raise ConfigError("--model is missing: name one, e.g. claude-sonnet-5-5, or try --dry-run")
        if self.batch and (self.provider != "anthropic" or self.dry_run):
            raise ConfigError("--batch needs --provider anthropic: other servers have no batches of this kind")
