"""Published tokenizers: what the engine writes by their ids is read again as text, by preprocessing and by training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_multiverse.config import EngineConfig
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.inference import Engine, Result, answer_text, training_row
from megatron_multiverse.structure import check_text

from .toy import NullModel, ScriptedSampler, ask

TAILS = (" x", "\n", "$x$", "**x**", "(a)", ":", "1", "é", "…", "\u4e00")
"""What may follow a label; many tokenizers have tokens that hold a colon and such a beginning."""


class LargeNullModel(NullModel):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, input_ids: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros(*input_ids.shape, self.vocab_size)


@pytest.fixture(scope="module")
def tokenizer(real_tokenizer: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(real_tokenizer)


def outlines(*labels: str) -> str:
    inside = "".join(f"<Outline>\n{label}\n</Outline>\n" for label in labels)
    return f"<Parallel>\n<Goal>\n{inside}</Goal>"


def answers(tokenizer: HuggingFaceTokenizer) -> list[Result]:
    """One answer for each tail: two paths, the second with a block of its own."""
    end = "\nboth\n</Conclusion>\n</Parallel>"
    scripts = [
        {
            (): [
                *ids(f"<Think>\nSee.\n{outlines(f'1:{tail}', f'2:{tail}b')}"),
                *ids(f"{end}\n</Think>"),
                tokenizer.eod,
            ],
            ((0, 0),): ids(f"{tail}\n</Path>"),
            ((0, 1),): [*ids(f"{tail}\n{outlines(f'2.1:{tail}')}"), *ids(f"{end}{tail}\n</Path>")],
            ((0, 1), (0, 0)): ids(f"{tail}{tail}\n</Path>"),
        }
        for ids in [tokenizer.tokenize]
        for tail in TAILS
    ]
    engine = Engine(
        LargeNullModel(tokenizer.vocab_size),
        tokenizer.structure_vocab,
        EngineConfig(num_pages=400, page_size=16),
        sampler=ScriptedSampler(scripts),
        vocab_size=tokenizer.vocab_size,
        detokenize=tokenizer.detokenize,
    )
    prompt = tokenizer.tokenize("Work it out.")
    return engine.generate([ask(prompt, sample=k, max_tokens=400) for k in range(len(TAILS))])


def test_answers_of_the_engine_preprocess_and_train(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    results = answers(tokenizer)
    texts = [answer_text(result, tokenizer.detokenize) for result in results]
    for result, text in zip(results, texts, strict=True):
        assert result.finish_reason == "stop" and not any(result.malformed.values()), text
        assert [len(block.branches) for block in result.blocks] == [2, 1], text
        check_text(text)
        row = training_row(result, tokenizer.structure_vocab)
        assert row.drawn.sum() == sum(result.sampled)
    rows = [{"prompt": "Work it out.", "response": text} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PreprocessConfig(
        input=str(tmp_path / "rows.jsonl"),
        output_prefix=str(tmp_path / "out"),
        tokenizer_model=str(tokenizer.path),
        append_eod=True,
        workers=1,
    )
    totals = preprocess_data(config).totals
    assert (totals.documents, totals.rejected.total()) == (len(TAILS), 0)
