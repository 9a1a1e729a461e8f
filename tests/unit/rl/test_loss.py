"""The policy loss over packed trees equals the plain one over single answers: value, gradient, log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron_multiverse.config import PolicyConfig
from megatron_multiverse.errors import DataError
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.model.weights import copy_weights
from megatron_multiverse.rl.advantages import group_advantages, is_settled
from megatron_multiverse.rl.loss import PolicyLoss, PolicyNumbers
from megatron_multiverse.rl.reference import policy_loss_reference
from megatron_multiverse.rl.trees import Tree, answer_tree, join_trees, microbatches
from megatron_multiverse.training.forward import forward_backward
from megatron_multiverse.training.placement import TokenPlacer
from tests.unit.inference.toy import EOS, VOCAB, VOCAB_SIZE

from .answers import CONFIG, advantages_of, answer_group

SEQ_LENGTH = 640


class NoTags:
    """Documents of which only the arrays count."""

    tag_ids = None


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_gpt_model(CONFIG, dtype=torch.float64, seed=1)


def moved(model: nn.Module, scale: float) -> nn.Module:
    """The model after an update in a random direction."""
    other, generator = build_gpt_model(CONFIG, dtype=torch.float64), torch.Generator().manual_seed(0)
    copy_weights(model, other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


def update(
    model: nn.Module, trees: list[Tree], policy: PolicyConfig, reference: nn.Module | None = None, *, rows: int = 2
) -> tuple[float, list[torch.Tensor], PolicyNumbers]:
    """Loss, gradients and numbers of one update over the trees, in microbatches of `rows` rows."""
    loss = PolicyLoss(policy, VOCAB_SIZE, torch.device("cpu"), reference)
    batches = microbatches(trees, SEQ_LENGTH, rows, 0, seed=3, step=1)
    placer = TokenPlacer(NoTags(), torch.device("cpu"), "dense")  # type: ignore[arg-type]
    model.zero_grad()
    sums = forward_backward(model, batches, placer, "float64", loss)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert sums.loss_tokens == sum(len(tree.targets.tokens) for tree in trees)
    return float(sums.loss), gradients, loss.take()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_equal_the_reference_on_random_trees(model: nn.Module, seed: int, share: bool) -> None:
    policy = PolicyConfig(clip_low=0.2, clip_high=0.28)
    groups = [answer_group(model, 10 * seed + k, soup=k == 2) for k in range(3)]
    advantages = [advantages_of(group, seed) for group in groups]
    trees = []
    for group, own in zip(groups, advantages, strict=True):
        single = [answer_tree(result, value, VOCAB) for result, value in zip(group, own, strict=True)]
        trees += join_trees(single, len(group[0].prompt_ids), SEQ_LENGTH) if share else single
    results, flat = [r for group in groups for r in group], [a for own in advantages for a in own]
    for scale in (0.0, 0.05):  # before the first update, and after one that moves many ratios beyond the clip
        current = moved(model, scale)
        value, gradients, numbers = update(current, trees, policy)
        current.zero_grad()
        expected = policy_loss_reference(current, results, flat, VOCAB, VOCAB_SIZE, clip_low=0.2, clip_high=0.28)
        expected.backward()
        assert value == pytest.approx(expected.item(), rel=1e-6), "the logged sum is float32, the gradient is not"
        for ours, parameter in zip(gradients, (p for p in current.parameters() if p.grad is not None), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-7, atol=1e-10)
        if scale:
            assert 0.05 < numbers.clip_share < 0.95 and numbers.ratio_far > 0.5
        else:
            assert numbers.drift_max < 1e-9, "the engine's log-probabilities are the trainer's"
            assert numbers.clip_share == numbers.ratio_far == 0


def test_end_tokens_are_trained_and_forced_ones_are_not(model: nn.Module) -> None:
    (result,) = answer_group(model, 1, size=1)
    tree = answer_tree(result, 1.0, VOCAB)
    assert len(tree.targets.tokens) == sum(result.sampled) + 1
    assert tree.targets.tokens[-1] == EOS and tree.targets.contexts[-1] == len(tree.sample.ids) - 1
    drawn = set(tree.targets.contexts[:-1] + 1)
    forced = {len(result.prompt_ids) + k for k, drawn in enumerate(result.sampled) if not drawn}
    assert forced and not drawn & forced


def test_answers_to_one_prompt_share_it_as_far_as_rows_are_long(model: nn.Module) -> None:
    results = answer_group(model, 5, size=4)
    prompt = len(results[0].prompt_ids)
    single = [answer_tree(result, 1.0, VOCAB) for result in results]
    lengths = [len(tree.sample.ids) - prompt for tree in single]
    (whole,) = join_trees(single, prompt, 10_000)
    assert len(whole.sample.ids) == prompt + sum(lengths)
    halves = join_trees(single, prompt, prompt + lengths[0] + lengths[1])
    assert len(halves[0].sample.ids) == prompt + lengths[0] + lengths[1] and len(halves) >= 2
    with pytest.raises(DataError, match="seq_length"):
        microbatches([whole], 16, 1, 0, seed=0, step=0)


def test_a_reference_model_holds_the_policy_back_as_the_plain_term_does(model: nn.Module) -> None:
    results = answer_group(model, 7)
    trees = [answer_tree(result, 0.5, VOCAB) for result in results]
    policy, current, frozen = PolicyConfig(kl_coef=0.3), moved(model, 0.05), moved(model, 0.0).requires_grad_(False)
    value, gradients, numbers = update(current, trees, policy, frozen)
    current.zero_grad()
    limits = {"clip_low": policy.clip_low, "clip_high": policy.clip_high}
    advantages = [0.5] * len(results)
    expected = policy_loss_reference(
        current, results, advantages, VOCAB, VOCAB_SIZE, **limits, reference=frozen, kl_coef=0.3
    )
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6) and numbers.kl > 0.01
    for ours, parameter in zip(gradients, (p for p in current.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-7, atol=1e-10)
    assert update(frozen.requires_grad_(True), trees, policy, frozen)[2].kl == 0


def test_the_term_of_the_reference_weighs_the_same_in_any_number_of_microbatches(model: nn.Module) -> None:
    results = [result for seed in (7, 8, 9, 10) for result in answer_group(model, seed)]
    trees = [answer_tree(result, 0.5, VOCAB) for result in results]
    policy, frozen = PolicyConfig(kl_coef=0.3), moved(model, 0.0).requires_grad_(False)
    assert len(microbatches(trees, SEQ_LENGTH, 1, 0, seed=3, step=1)) >= 3
    one, many = (update(moved(model, 0.05), trees, policy, frozen, rows=rows) for rows in (len(trees), 1))
    assert one[0] == pytest.approx(many[0], rel=1e-6) and one[2].kl == pytest.approx(many[2].kl, rel=1e-6)
    for whole, cut in zip(one[1], many[1], strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-7, atol=1e-10)


def test_a_rank_without_trees_takes_part_with_a_row_of_padding(model: nn.Module) -> None:
    value, gradients, numbers = update(model, [], PolicyConfig())
    assert value == numbers.targets == 0 and len(gradients) == len(list(model.parameters()))
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_compare_an_answer_with_its_group(scale: Any) -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    group = group_advantages(rewards, scale=scale)
    others = np.array([reward - np.delete(rewards, k).mean() for k, reward in enumerate(rewards)])
    divisor = rewards.std(ddof=1) if scale == "std" else 1.0
    np.testing.assert_allclose(group, (rewards - 0.6) / divisor)
    np.testing.assert_allclose(group_advantages(rewards, baseline="leave_one_out", scale=scale), others / divisor)
    assert is_settled(np.full(4, 0.3)) and not group_advantages(np.full(4, 0.3), scale=scale).any()
