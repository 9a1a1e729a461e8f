"""From prompts to answers with a model folder: what tools/generate.py does."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from tqdm import tqdm

from megatron_multiverse.checkpoints.sources import loadable
from megatron_multiverse.config import EngineConfig, EngineDType, SamplingParams, TokenizerType
from megatron_multiverse.config.choices import FreeText
from megatron_multiverse.data.chat_templates import DEFAULT_DATE, parse_date
from megatron_multiverse.data.generation_config import end_ids
from megatron_multiverse.data.prompts import SUFFIXES
from megatron_multiverse.data.readers import read_rows
from megatron_multiverse.data.sources import open_source
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.data.turns import refuse_tools
from megatron_multiverse.dtypes import engine_dtype
from megatron_multiverse.errors import DataError, GenerationError, MultiverseError
from megatron_multiverse.files import is_same_file, naming, write_line
from megatron_multiverse.inference.build import build_engine, follow_engine
from megatron_multiverse.inference.conversation import Prompts, check_messages, encode, render_prompt
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.record import to_record
from megatron_multiverse.inference.text.answer import answer_text
from megatron_multiverse.inference.text.request import Request
from megatron_multiverse.inference.text.result import Result
from megatron_multiverse.inference.text.state import TokenCallback
from megatron_multiverse.model.device import choose_device

logger = logging.getLogger(__name__)

Watch: TypeAlias = Callable[[MultiverseTokenizer, str], TokenCallback]
"""Called with the tokenizer and the prompt."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of tools/generate.py."""

    load: Path
    """Checkpoint in any format: Hugging Face, megatron-core, or a model folder of the trainer."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """Megatron's name of the kind of tokenizer."""
    tokenizer_model: str | None = None
    """Tokenizer folder, file or hub name; by default the model folder."""
    prompt: FreeText | None = None
    """One prompt; or give --input."""
    input: Path | None = None
    """Rows with a field "prompt", or with --chat "messages", the turns of a conversation, each with role and content: a
    file of JSON Lines or Parquet, or a folder of such files."""
    output: Path | None = None
    """JSON Lines to write, one row per answer as it finishes; by default answers go to the terminal."""
    live: bool = False
    """Show the branches of one answer side by side while they grow, instead of its text at the end."""
    records: Path | None = None
    """JSON Lines to write as well, one record per answer: each token with its log-probability, position, visibility
    label and segment (docs/engine.md)."""
    prompt_suffix: Literal["none", "parallel", "sequential"] = "none"
    """Sentence to put after each prompt, as tools/preprocess_data.py does: models trained with it fork when they read
    it."""
    chat: bool = False
    """Wrap each prompt in the chat template of the tokenizer."""
    replay_structure: bool = False
    """Lay the earlier answers of a conversation out again as they were generated, instead of reading their blocks as
    text."""
    template_date: str | None = None
    """Date that a chat template writes which would write today's; by default 2024-07-26, as tools/preprocess_data.py
    writes it, so that the model reads what it was trained on."""
    sequential: bool = False
    """Decode path after path instead of all at once; the answers are the same."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=2048))
    """How answers are drawn, and where they end. The end tokens that generation_config.json of the model names end them
    anyway."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Sizes and limits of the engine."""
    dtype: EngineDType = "auto"
    """Type of weights and cache; auto takes bf16 on a GPU and float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a GPU."""
    tensor_model_parallel_size: int = 1
    """Processes that each hold a part of every layer; torchrun starts them."""
    pipeline_model_parallel_size: int = 1
    """Processes, times that, that each hold some of the layers."""

    def __post_init__(self) -> None:
        if self.template_date is not None and not self.chat:
            raise GenerationError("--template-date has no effect without --chat: add --chat, or leave it out")
        if self.replay_structure and not self.chat:
            raise GenerationError("--replay-structure is of conversations: add --chat, or leave it out")
        parse_date(self.template_date or DEFAULT_DATE)


def write_answers(config: GenerateConfig) -> tuple[int, int]:
    """Write a row to `config.output` whenever an answer finishes.

    Returns:
        How many answers were written, and how many rows of the input were refused.

    Raises:
        MultiverseError: see `generate_answers`.
        OSError: the output cannot be written, which shows before the model is loaded. Until the first answer is there,
            the file keeps what it held.
    """
    assert config.output is not None
    if config.live:
        raise GenerationError("--live shows the answer in the terminal; leave out --live, or --output")
    answered = refused = 0
    with naming(config.output), config.output.open("a", encoding="utf-8") as file:
        for row in generate_answers(config):
            if not answered + refused and file.seekable():
                file.truncate(0)
            write_line(file, json.dumps(row, ensure_ascii=False))
            failed = row["finish_reason"] == "error"
            answered, refused = answered + (not failed), refused + failed
    return answered, refused


def generate_answers(config: GenerateConfig, *, watch: Watch | None = None) -> Iterator[dict[str, Any]]:
    """Answer the prompts of `config`.

    Args:
        config: what to answer, and how.
        watch: makes what hears the tokens of the answer, of which there may be one then.

    Yields:
        One row per answer, as they finish: index (of the prompt, from 0), sample, prompt or messages, text,
        finish_reason, counts, blocks and timeline. A row of the input that cannot be answered gives index,
        finish_reason "error" and error.

    Raises:
        DataError: no prompts.
        CheckpointError, ConfigError: no model, or a tokenizer of another model.
        GenerationError: options that cannot work, or `config.prompt` cannot be answered.
    """
    _check_files(config)
    prompts = _prompts(config)
    if watch is not None and (len(prompts) > 1 or config.sampling.n > 1):
        raise GenerationError("--live shows one answer; give one prompt and leave --sampling.n at 1")
    config = dataclasses.replace(config, load=loadable(config.load))
    tokenizer = _tokenizer(config)
    date = parse_date(config.template_date or DEFAULT_DATE) if config.chat else None
    suffix, replay = SUFFIXES[config.prompt_suffix], config.replay_structure
    texts = [render_prompt(prompt, tokenizer, suffix=suffix, date=date, replay=replay) for prompt in prompts]
    encoded = encode(texts, tokenizer)
    engine = _build_engine(config, tokenizer, max(len(ids) for ids, _ in encoded))
    sampling = _sampling(config, [] if config.sampling.ignore_eos else end_ids(config.load, tokenizer))
    origin: dict[int, int] = {}
    for index, prompt in enumerate(prompts):
        try:
            if isinstance(cut := texts[index], MultiverseError):
                raise cut
            assert not isinstance(prompt, MultiverseError), "its text is the error"
            title = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            on_token = None if watch is None else watch(tokenizer, title)
            ids, spans = encoded[index]
            request = Request(prompt_ids=ids, sampling=sampling, replay_structure=spans)
            first = engine.add_request(request, on_token=on_token)
            origin |= dict.fromkeys(range(first, first + sampling.n), index)
        except MultiverseError as error:
            if config.input is None:
                raise
            yield {"index": index, "finish_reason": "error", "error": str(error)}
    bar = tqdm(total=len(origin), unit="answer", disable=True if watch else None)
    with contextlib.closing(engine), _record_file(config) as records, bar:
        while engine.has_work:
            for result in engine.step():
                index = origin[result.request_id]
                bar.update()
                if records is not None:
                    write_line(records, json.dumps({"index": index, **to_record(result)}))
                text = answer_text(result, tokenizer.detokenize)
                asked = "prompt" if isinstance(prompts[index], str) else "messages"
                yield {"index": index, asked: prompts[index], "text": text, **_facts(result)}


def _check_files(config: GenerateConfig) -> None:
    """Refuse to write over the input, or two things into one file."""
    named = {"--input": config.input, "--output": config.output, "--records": config.records}
    given = [(flag, path) for flag, path in named.items() if path is not None]
    for (first, one), (second, other) in itertools.combinations(given, 2):
        if is_same_file(one, other):
            raise GenerationError(f"{second} {other} is the file of {first}, too; give it another name")


@contextlib.contextmanager
def _record_file(config: GenerateConfig) -> Iterator[TextIO | None]:
    if config.records is None:
        yield None
    else:
        with naming(config.records), config.records.open("w", encoding="utf-8") as records:
            yield records


def follow_answers(config: GenerateConfig) -> None:
    """What the other ranks do while the first one writes answers."""
    device = choose_device(config.device)
    follow_engine(config.load, dtype=engine_dtype(config.dtype, device), device=device)


def _tokenizer(config: GenerateConfig) -> MultiverseTokenizer:
    """The tokenizer named, or the one in the folder of the model."""
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model or config.load)
    if config.chat and tokenizer.chat_template is None:
        raise GenerationError("--chat: the tokenizer has no chat template; leave --chat out, or add a template to it")
    return tokenizer


def _build_engine(config: GenerateConfig, tokenizer: MultiverseTokenizer, longest_prompt: int) -> Engine:
    device = choose_device(config.device)
    return build_engine(
        config.load,
        tokenizer,
        config.engine,
        longest=longest_prompt + config.sampling.max_tokens,
        dtype=engine_dtype(config.dtype, device),
        device=device,
    )


def _sampling(config: GenerateConfig, ends: list[int]) -> SamplingParams:
    """What `config` asks of every answer, which also ends at the ids `ends`."""
    sampling = dataclasses.replace(config.sampling, stop_token_ids=(*config.sampling.stop_token_ids, *ends))
    return dataclasses.replace(sampling, max_concurrent_branches=1) if config.sequential else sampling


def _prompts(config: GenerateConfig) -> Prompts:
    if (config.prompt is None) == (config.input is None):
        raise GenerationError("give either --prompt TEXT or --input FILE.jsonl")
    if config.prompt is not None:
        return [config.prompt]
    assert config.input is not None
    if not config.input.exists():
        raise DataError(f"--input {config.input}: no such file or folder")
    prompts: Prompts = []
    rows = (row for shard in open_source(str(config.input)).shards for row in read_rows(shard))
    for number, row in enumerate(rows, 1):
        if row.is_blank:
            continue
        prompt, messages = (row.fields.get(name) for name in ("prompt", "messages"))
        try:
            if isinstance(prompt, str) and prompt:
                prompts.append(prompt)
            elif prompt is None and messages is not None:
                if not config.chat:
                    raise DataError('"messages" need a chat template: add --chat')
                refuse_tools(row.fields)
                prompts.append(check_messages(messages))
            else:
                fields = ", ".join(row.fields) or "none"
                raise DataError(row.error or f'no text in the field "prompt" (fields: {fields})')
        except DataError as error:
            prompts.append(DataError(f"{config.input}, row {number}: {error}"))
    if not prompts:
        raise DataError(f"{config.input} holds no prompts")
    return prompts


def _facts(result: Result) -> dict[str, Any]:
    return {
        "sample": result.sample,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "tokens": len(result.token_ids),
        "critical_tokens": result.critical_tokens,
        "num_parallel": round(result.num_parallel, 4),
        "decode_steps": result.decode_steps,
        "dropped_tokens": result.dropped_tokens,
        "freed_pages": result.freed_pages,
        "malformed": dict(result.malformed),
        "blocks": [asdict(block) for block in result.blocks],
        "timeline": [span._asdict() for span in result.timeline],
        "error": result.error,
    }
