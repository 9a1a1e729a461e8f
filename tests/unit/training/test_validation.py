"""Tags are counted where they are trained, and as correct where the likeliest token is the tag."""

from __future__ import annotations

import torch
from torch import nn

from megatron_multiverse.model.mcore import ensure_parallel_state
from megatron_multiverse.training.validation import TagCounter, Validation

TAGS = (7, 8, 9)


class Head(nn.Module):
    """An output layer as megatron-core's: what it is given are the logits [s, b, vocab]."""

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        return logits, None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output_layer = Head()

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.output_layer(logits)[0]


def test_counts_are_those_of_the_logits() -> None:
    ensure_parallel_state()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, 10, generator=generator)  # [s, b, vocab]
    labels = torch.randint(0, 10, (3, 40), generator=generator)
    mask = (torch.rand(3, 40, generator=generator) < 0.7).float()
    logits[:20].scatter_(2, labels.T[:20, :, None], 9.0)  # right in the first half
    model = Model()
    with TagCounter([model], TAGS) as tags:
        assert tags.count(labels, mask).tolist() == [0, 0], "no pass yet"
        model(logits)
        counted = tags.count(labels, mask).tolist()
        assert tags.count(labels, mask).tolist() == [0, 0], "each pass once"
    trained = [(int(labels[b, s]), logits[s, b]) for b in range(3) for s in range(40) if mask[b, s]]
    of_tags = [(label, int(row.argmax())) for label, row in trained if label in TAGS]
    assert counted == [len(of_tags), sum(label == likeliest for label, likeliest in of_tags)]
    assert 0 < counted[1] < counted[0]
    model(logits)
    assert tags.count(labels, mask).tolist() == [0, 0], "nothing is looked at after the block"


def test_without_tags_there_is_no_share() -> None:
    with TagCounter([Model()], None) as tags:
        assert tags.count(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4)).tolist() == [0, 0]
    assert Validation.of_sums(torch.tensor([6.0, 0.0, 0.0]), 3) == Validation(2.0, 3)
    assert Validation(2.0, 3).tag_accuracy is None and Validation(2.0, 3, 4, 3).tag_accuracy == 0.75
