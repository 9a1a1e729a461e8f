"""From prompts to answers with a model folder: what tools/generate.py does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from megatron_multiverse.conversion.load import load_checkpoint
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import DataError, GenerationError
from megatron_multiverse.inference.engine import Engine
from megatron_multiverse.inference.request import Request
from megatron_multiverse.inference.result import Result

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of tools/generate.py."""

    load: Path
    """Checkpoint in any layout: Hugging Face, megatron-core, or a model folder of the trainer."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] = "HuggingFaceTokenizer"
    """Megatron's name of the kind of tokenizer."""
    tokenizer_model: str | None = None
    """Tokenizer folder, file or hub name; by default the model folder."""
    prompt: str | None = None
    """One prompt; or give --input."""
    input: Path | None = None
    """JSONL with a field "prompt" in each row."""
    output: Path | None = None
    """JSONL to write; by default answers go to the terminal."""
    chat: bool = False
    """Wrap each prompt in the chat template of the tokenizer."""
    sequential: bool = False
    """Decode path after path instead of all at once; the answers are the same."""
    max_tokens: int = 2048
    """Most tokens per answer, all branches together."""
    max_critical_tokens: int | None = None
    """Most tokens on the longest chain of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1 is off."""
    seed: int = 0
    """Seed of the sampling noise."""
    page_size: int = 16
    """Tokens per cache page: 1, 16 or 64."""
    num_pages: int = 0
    """Cache pages; 0 takes enough for eight of the longest answers at once."""
    max_rows: int = 64
    """Branches per step."""
    dtype: Literal["float32", "bf16", "float64"] = "float32"
    """Type of weights and cache."""
    device: str = "auto"
    """cpu, cuda or auto."""


def generate(config: GenerateConfig) -> Iterator[dict[str, Any]]:
    """Answer the prompts of `config`.

    Yields:
        One row per prompt, in order: prompt, text, finish_reason, counts, blocks and timeline.

    Raises:
        DataError: no prompt, or a row of the input that holds none.
        GenerationError: a prompt that cannot be served.
    """
    prompts = _prompts(config)
    tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model or config.load)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load_checkpoint(config.load, dtype=_DTYPES[config.dtype], device=device)
    texts = [tokenizer.render_chat(prompt) if config.chat else prompt for prompt in prompts]
    requests = [
        Request(
            prompt_ids=ids,
            max_tokens=config.max_tokens,
            max_critical_tokens=config.max_critical_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            max_concurrent_branches=1 if config.sequential else None,
        )
        for ids in tokenizer.tokenize_batch(texts)
    ]
    longest = max(len(request.prompt_ids) for request in requests) + config.max_tokens
    engine = Engine(
        model,
        tokenizer.structure_vocab,
        num_pages=config.num_pages or 8 * (-(-longest // config.page_size) + 16),
        page_size=config.page_size,
        max_rows=config.max_rows,
        vocab_size=tokenizer.vocab_size,
    )
    for prompt, result in zip(prompts, _serve(engine, requests), strict=True):
        yield _row(prompt, tokenizer.detokenize(result.token_ids), result)


def _serve(engine: Engine, requests: list[Request]) -> list[Result]:
    for request in requests:
        engine.check(request)
    for request in requests:
        engine.add_request(request)
    results: list[Result] = []
    with tqdm(total=len(requests), unit="answer", disable=None) as bar:
        while engine.has_work:
            done = engine.step()
            results += done
            bar.update(len(done))
    return sorted(results, key=lambda result: result.request_id)


def _prompts(config: GenerateConfig) -> list[str]:
    if (config.prompt is None) == (config.input is None):
        raise GenerationError("give either --prompt TEXT or --input FILE.jsonl")
    if config.prompt is not None:
        return [config.prompt]
    assert config.input is not None
    prompts = []
    for number, line in enumerate(config.input.read_text(encoding="utf-8").splitlines(), 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'{config.input}, line {number}: each line must be a JSON object with a field "prompt" ({error!r})'
            ) from error
    if not prompts:
        raise DataError(f"{config.input} holds no prompts")
    return prompts


def _row(prompt: str, text: str, result: Result) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": text,
        "finish_reason": result.finish_reason,
        "tokens": len(result.token_ids),
        "critical_tokens": result.critical_tokens,
        "num_parallel": round(result.num_parallel, 4),
        "decode_steps": result.decode_steps,
        "malformed": dict(result.malformed),
        "blocks": [asdict(block) for block in result.blocks],
        "timeline": [span._asdict() for span in result.timeline],
        "error": result.error,
    }
