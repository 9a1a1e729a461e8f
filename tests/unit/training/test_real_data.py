"""Real trajectories from files to falling loss: preprocessing, packing, the loop, and the masks it must not keep."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.kernels.multiverse_attention import backends
from megatron_multiverse.training.trainer import train

SEQ_LENGTH = 4096


def train_bpe(corpus: list[str], folder: Path) -> Path:
    """A byte-level BPE of the trajectories, without the tags."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "pad_token": "<|end|>"}))
    return folder


class MaskWatch:
    """Weak references to every dense mask; no two may live at once, since each belongs to one microbatch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: list[weakref.ref[torch.Tensor]] = []
        dense = self.watched(backends.BACKENDS["dense"])
        monkeypatch.setitem(backends.BACKENDS, "dense", dense)

    def watched(self, backend: Any) -> Any:
        def prepare(*given: Any) -> Any:
            assert self.alive() == 0, "the mask of an earlier microbatch is still alive"
            plan = backend.prepare(*given)
            assert plan.mask.shape[-2:] == (SEQ_LENGTH, SEQ_LENGTH)
            self.masks.append(weakref.ref(plan.mask))
            return plan

        return dataclasses.replace(backend, prepare=prepare)

    def alive(self) -> int:
        return sum(mask() is not None for mask in self.masks)


def test_twenty_steps_on_real_trajectories(
    tmp_path: Path, samples_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [file.read_text(encoding="utf-8") for file in sorted(samples_folder.glob("*.xml"))]
    tokenizer = train_bpe(texts, tmp_path / "tokenizer")
    done = preprocess_data(
        PreprocessConfig(
            input=str(samples_folder),
            output_prefix=str(tmp_path / "set"),
            tokenizer_model=str(tokenizer),
            append_eod=True,
            workers=1,
        )
    )
    assert done.totals.documents == len(texts) and not done.too_many_rejected
    config = TrainConfig.from_dict(
        {
            "model": {
                "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2,
                "num_query_groups": 1, "kv_channels": 16, "vocab_size": 2048, "max_sequence_length": SEQ_LENGTH,
            },
            "data": {
                "data_prefixes": [str(tmp_path / "set")], "tokenizer_model": str(tokenizer), "seq_length": SEQ_LENGTH,
                "overlong": "drop", "num_workers": 0,
            },
            "optim": {"lr": 1e-2, "lr_warmup_iters": 2, "lr_decay_style": "constant"},
            "checkpoint": {"save": str(tmp_path / "run"), "save_interval": 0},
            "log": {"log_interval": 1},
            "train_iters": 20, "device": "cpu",
        }
    )  # fmt: skip
    watch = MaskWatch(monkeypatch)
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == len(watch.masks) == 20
    assert watch.alive() == 0
    assert losses[0] == pytest.approx(7.6, abs=0.3)  # log(2048): a fresh model knows nothing
    assert losses[-1] < losses[0] - 1.5
