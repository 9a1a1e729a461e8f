"""Options of tools/evaluate.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_multiverse.config import EngineConfig, EngineDType, SamplingParams, TokenizerType
from megatron_multiverse.errors import ConfigError, GenerationError
from megatron_multiverse.evaluation.tasks import Thinking


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How answers are drawn. The defaults are those of the field for models that reason.

    Raises:
        ConfigError: a value that nothing can be drawn with.
    """

    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = 0.95
    """1 is off."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """0 is off."""
    max_tokens: int = 32768
    """Most tokens of an answer, those of all its branches together."""

    def __post_init__(self) -> None:
        try:  # now, not when the model has been loaded
            SamplingParams(**vars(self))
        except GenerationError as error:
            raise ConfigError(f"--draw: {error}") from error


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of tools/evaluate.py.

    Raises:
        ConfigError: options that cannot work together.
    """

    tasks: list[str] = field(default_factory=list)
    """aime24, aime25, aime26, hmmt25, math500, gpqa_diamond, or names of your own with --data; as several words or with
    commas between them."""
    data: list[str] = field(default_factory=list)
    """NAME=FILE: local rows of a task (.jsonl, .parquet, .csv, folder), with the columns of the hub: problem or
    question, answer or solution; or Question, Correct Answer, Incorrect Answer 1 to 3."""
    limit: int | None = None
    """Only the first so many problems of each task."""
    load: Path | None = None
    """Checkpoint in any format, served in this process; or give --url."""
    url: list[str] = field(default_factory=list)
    """Addresses of running tools/run_text_generation_server.py, such as http://127.0.0.1:5000; several servers of one
    model share the answers. Their key, if they want one, is read from MULTIVERSE_API_KEY."""
    output: Path = Path("runs/evaluation")
    """Folder of the run: samples.jsonl, report.md, report.json, report.png. The same command goes on with it."""
    num_seeds: int = 1
    """Answers to each problem, drawn with the seeds 0, 1, ... (the paper averages over 8)."""
    thinking: list[Thinking] = field(default_factory=lambda: ["parallel"])
    """Sentence after each question: parallel and sequential as models are trained with, or none. Several are compared
    in one report."""
    budgets: list[int] = field(default_factory=list)
    """Most tokens on the longest chain of an answer; several are compared in one report (the paper's Figure 7)."""
    sequential: bool = False
    """Decode path after path instead of all at once; the answers are the same."""
    chat: bool = True
    """Wrap each question in the chat template of the model, if it has one."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    """How answers are drawn."""
    concurrency: int = 8
    """Answers under way at once, over all servers; 1 measures the wall clock of one answer alone."""
    compare: list[Path] = field(default_factory=list)
    """Two finished runs to compare, problem by problem, instead of evaluating: the second against the first."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """With --load."""
    tokenizer_model: str | None = None
    """With --load: tokenizer folder, file or hub name; by default the checkpoint."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """With --load: sizes and limits of the engine."""
    dtype: EngineDType = "auto"
    """With --load: type of weights and cache; auto takes bf16 on a GPU and float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """With --load: auto takes CUDA when there is a GPU."""
    timeout: float = 3600.0
    """With --url: seconds to wait for an answer."""
    allow_other_weights: bool = False
    """With --url: go on with a run although the server has other weights now than those of the answers in it."""

    def __post_init__(self) -> None:
        names = [name for word in self.tasks for name in word.split(",") if name]
        for name, values in (("tasks", names), ("budgets", self.budgets), ("thinking", self.thinking)):
            object.__setattr__(self, name, list(dict.fromkeys(values)))  # one that is named twice is asked for once
        if self.compare:
            if len(self.compare) != 2 or self.tasks or self.load or self.url:
                raise ConfigError("--compare takes two folders of finished runs, and no --tasks, --load or --url")
            return
        if not self.tasks:
            raise ConfigError("--tasks is missing: name one or more, e.g. --tasks aime24,math500")
        if (self.load is None) == (not self.url):
            raise ConfigError("give either --load CHECKPOINT or --url SERVER")
        for name in ("num_seeds", "concurrency", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if any(budget < 1 for budget in self.budgets):
            raise ConfigError(f"--budgets must be at least 1, got {self.budgets}")
        if max(self.budgets, default=0) > (most := self.draw.max_tokens):
            raise ConfigError(
                f"--budgets {max(self.budgets)} is above --draw.max-tokens {most}, the most tokens of all branches "
                "together, so that it bounds nothing: raise that, or lower the budget"
            )
        if self.draw.temperature == 0 and self.num_seeds > 1:
            raise ConfigError(
                f"--num-seeds {self.num_seeds} at temperature 0, where all answers are the same: leave one of them out"
            )
        if not self.thinking:
            raise ConfigError("--thinking is empty: name parallel, sequential or none")

    def sources(self) -> dict[str, str]:
        """Task -> local file.

        Raises:
            ConfigError: not of the form NAME=FILE, a task that is not asked for, or two files for one.
        """
        found: dict[str, str] = {}
        for entry in self.data:
            name, equals, file = entry.partition("=")
            if not (name and equals and file):
                raise ConfigError(f"--data {entry}: write NAME=FILE, e.g. --data aime24=aime24.jsonl")
            if name not in self.tasks:
                raise ConfigError(f"--data {entry}: {name} is not among --tasks {' '.join(self.tasks)}")
            if found.setdefault(name, file) != file:
                raise ConfigError(
                    f"--data {entry}: {name} is {found[name]} already; a task is one file or one folder, so join them, "
                    "or give each a name of its own"
                )
        return found
