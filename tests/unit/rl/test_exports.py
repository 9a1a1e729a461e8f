"""Rows for other trainers hold what was drawn, once, with the log-probabilities that they would compute."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.inference import Result, to_record
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.rl.exports import AFTER_A_JOIN, expanded_rows, export_records, linear_row
from tests.unit.inference.toy import VOCAB_SIZE

from .answers import CONFIG, answer_group


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_gpt_model(CONFIG, dtype=torch.float64, seed=1)


def logprobs_of(model: nn.Module, ids: list[int], position_ids: list[int], r: list[int]) -> torch.Tensor:
    """Log-probability distributions after each token of a row."""
    params = LayoutParams.from_labels(torch.tensor([r]), backend="dense")
    with torch.no_grad():
        logits = model(torch.tensor([ids]), torch.tensor([position_ids]), None, packed_seq_params=params)
    return logits[0, :, :VOCAB_SIZE].log_softmax(-1)


def drawn_tokens(result: Result) -> Counter[tuple[int, float]]:
    texts = zip(result.token_ids, result.logprobs, strict=True)
    drawn = Counter((token, logprob) for token, logprob in texts if logprob is not None)
    return drawn + Counter((end.token, end.logprob) for end in result.ends)


@pytest.mark.parametrize("seed", range(6))
def test_a_causal_trainer_computes_the_logprobs_of_expanded_rows(model: nn.Module, seed: int) -> None:
    for result in answer_group(model, seed, soup=seed % 3 == 2):
        rows, left_out = expanded_rows(result)
        found: Counter[tuple[int, float]] = Counter()
        for row in rows:
            ids = row.prompt_ids + row.response_ids
            assert ids[: len(result.prompt_ids)] == result.prompt_ids and len(row.weight_versions) == len(
                row.response_ids
            )
            causal = list(range(len(ids)))
            own = logprobs_of(model, ids, causal, causal)
            for index, (token, mask, logprob) in enumerate(
                zip(row.response_ids, row.response_mask, row.response_logprobs, strict=True), len(row.prompt_ids)
            ):
                if mask:
                    assert abs(own[index - 1, token].item() - logprob) < 1e-9
                    found[token, logprob] += 1
        assert found <= drawn_tokens(result), "no token counts twice"
        after_joins = sum(part.drawn for part in left_out)
        missing = (drawn_tokens(result) - found).total()
        assert after_joins <= missing <= after_joins + len(result.ends)
        assert bool(left_out) == any(len(block.branches) > 0 for block in result.blocks)
        assert all(part.reason == AFTER_A_JOIN for part in left_out)


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_row_has_everything_for_one_forward_pass(model: nn.Module, seed: int) -> None:
    for result in answer_group(model, seed, soup=seed == 2):
        row = linear_row(result)
        own = logprobs_of(model, row["input_ids"], row["position_ids"], row["r"])
        parents = [*range(-1, len(result.prompt_ids) - 1), *(len(result.prompt_ids) + p for p in result.parents)]
        for index, (token, mask, logprob) in enumerate(
            zip(row["input_ids"], row["loss_mask"], row["logprobs"], strict=True)
        ):
            assert not mask or abs(own[parents[index], token].item() - logprob) < 1e-9
        for before, token, logprob in row["ends"]:
            assert abs(own[before, token].item() - logprob) < 1e-9
        assert sum(row["loss_mask"]) + len(row["ends"]) == drawn_tokens(result).total()


def test_records_become_rows_in_a_file(model: nn.Module, tmp_path: Path) -> None:
    results = answer_group(model, 1)
    records = [{"reward": 1.0, "advantage": 0.5, **to_record(result)} for result in results]
    source, target = tmp_path / "rollouts.jsonl", tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    totals = export_records(source, target, "expanded")
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert totals.answers == 3 and totals.rows == len(rows) > 3 and totals.left_out > 0
    assert {row["record"] for row in rows} == {1, 2, 3} and {row["advantage"] for row in rows} == {0.5}
    counted = sum(sum(row["response_mask"]) for row in rows)
    ends = sum(len(result.ends) for result in results)
    assert totals.drawn - totals.left_out <= counted <= totals.drawn - totals.left_out + ends
    assert export_records(source, target, "linear").rows == 3
    source.write_text(source.read_text()[:-40], encoding="utf-8")
    with pytest.raises(DataError, match="line 3"):
        export_records(source, target, "linear")
    source.write_text('{"kind": "train", "step": 1}\n')  # metrics.jsonl in its place, say
    with pytest.raises(DataError, match=rf"{source}, line 1: not an answer record of the form .*, but None; tools/gen"):
        export_records(source, target, "linear")
    target.unlink()
    source.write_text("")
    with pytest.raises(DataError, match=f"^{source} is empty"):
        export_records(source, target, "linear")
    assert not target.exists()
    with pytest.raises(ConfigError, match="no such file"):
        export_records(tmp_path / "none", target, "linear")
    with pytest.raises(ConfigError, match=": a folder; name rollouts"):
        export_records(tmp_path, target, "linear")


def test_records_are_not_written_over(tmp_path: Path) -> None:
    records = tmp_path / "rollouts.jsonl"
    records.write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to(records)
    for target in (records, tmp_path / "link.jsonl"):
        with pytest.raises(ConfigError, match="is the input"):
            export_records(records, target, "linear")
    assert records.read_text() == "{}\n"
