"""Weights that one of two tensor parallel ranks fails to change: both hear of it, and both go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import distributed, nn

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.inference import Engine, Request, build_engine
from megatron_multiverse.model.mcore import set_parallel_sizes
from megatron_multiverse.model.weights import copy_tensors, weight_state
from megatron_multiverse.parallel.local_ranks import run_ranks
from megatron_multiverse.server import rank_model
from megatron_multiverse.server.engine_control import EngineControl
from megatron_multiverse.server.rank_messages import PartlyChanged
from megatron_multiverse.server.rank_model import follow_control
from megatron_multiverse.server.weight_checks import WeightChecks
from tests.unit.server.running import MODEL, PROMPT, tokenizer
from tests.unit.server.trainers import folder as folder


def answer(engine: Engine) -> list[int]:
    sampling = SamplingParams(max_tokens=24, temperature=0)
    (result,) = engine.generate([Request(prompt_ids=tokenizer().tokenize(PROMPT), sampling=sampling)])
    return list(result.token_ids)


def fail_once(way: str) -> None:
    """On this rank the next change of weights fails after its first tensor, those after it do not."""
    copy_weights, run = rank_model.copy_weights, WeightChecks.run

    def copy_one(new: nn.Module, model: nn.Module) -> None:
        rank_model.copy_weights = copy_weights
        name, tensor = next(iter(weight_state(new).items()))
        copy_tensors({name: tensor}, model)
        raise RuntimeError("no memory")

    def reset_one(checks: WeightChecks, action: Any) -> list[str]:
        WeightChecks.run = run  # type: ignore[method-assign]
        next(iter(weight_state(checks._model).values())).fill_(0.5)
        raise RuntimeError("no memory")

    if way == "update":
        rank_model.copy_weights = copy_one
    else:
        WeightChecks.run = reset_one  # type: ignore[method-assign]


def change_where_one_fails(failing: int, way: str, changed: Path) -> dict[str, Any] | None:
    """On two ranks; what the first one has seen."""
    set_parallel_sizes(2, 1)
    first = distributed.get_rank() == 0
    engine = build_engine(MODEL, tokenizer(), EngineConfig()) if first else None
    model = None if first else load_checkpoint(MODEL)[0]
    if distributed.get_rank() == failing:
        fail_once(way)
    if model is not None:
        follow_control(model, str(MODEL))
        return None
    assert engine is not None
    control, seen = EngineControl(engine, str(MODEL)), {"before": answer(engine)}
    weights = control.weights
    try:
        control.update(str(changed), "new") if way == "update" else control.check("reset_tensors")
    except PartlyChanged as error:
        seen |= {"error": str(error), "cause": repr(error.__cause__)}
    seen |= {"name": control.versions[-1], "has_other_weights": control.weights != weights, "partly": answer(engine)}
    control.update(str(changed), "new")
    seen |= {"last_name": control.versions[-1], "after": answer(engine)}
    control.close()
    return seen


@pytest.mark.parametrize("way", ["update", "reset"])
@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_rank_is_told_on_the_first_and_can_be_mended(failing: int, way: str, folder: Path) -> None:
    seen, _ = run_ranks(change_where_one_fails, 2, failing, way, folder, timeout=120)
    assert "changed in part only" in seen["error"], "the other rank's failure, too"
    assert seen["cause"] == ("RuntimeError('no memory')" if failing == 0 else "None")
    assert seen["name"] == "partly_changed" and seen["has_other_weights"]
    assert seen["partly"] != seen["before"] == answer(build_engine(MODEL, tokenizer(), EngineConfig()))
    assert seen["last_name"] == "new" and seen["after"] == answer(build_engine(folder, tokenizer(), EngineConfig()))
