"""The state of a run on disk: everything comes back, and whatever is damaged is named."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_multiverse.config import ModelConfig
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.model.gpt import build_gpt_model
from megatron_multiverse.training.checkpoint import TrainState, begin_saving, explained, load_state
from megatron_multiverse.training.one_process import OneProcessEngine
from tests.extra_states import assert_extra_states_load

from .synthetic import SyntheticLoader, config


def new_state(seed: int, tied: bool, **shape: object) -> TrainState:
    run = config(Path("unused"), train_iters=10, **{"optim.lr_warmup_iters": 0})
    model_config: ModelConfig = dataclasses.replace(run.model, share_embeddings_and_output_weights=tied, **shape)
    model, loader = build_gpt_model(model_config, seed=seed), SyntheticLoader()
    layers = dataclasses.replace(run.layers, attention_backend="dense")
    return TrainState(OneProcessEngine(run, model, model_config, layers, loader), loader)


def one_step(state: TrainState) -> None:
    state.step += 1
    state.engine.step([next(iter(state.loader))])


@pytest.mark.parametrize("tied", [True, False])
def test_everything_comes_back(tmp_path: Path, tied: bool) -> None:
    state = new_state(0, tied)
    for _ in range(3):
        one_step(state)
    state.consumed_samples = 12
    torch.manual_seed(5)
    begin_saving(state, tmp_path).finish()
    drawn = torch.rand(3)

    other = new_state(1, tied)
    load_state(other, tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    assert (other.step, other.consumed_samples, other.loader.position) == (3, 12, state.loader.position)
    assert other.engine.scheduler.num_steps == 3
    for _ in range(2):
        one_step(state)
        one_step(other)
    mine, theirs = state.engine, other.engine
    for (name, a), b in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(mine.optimizer.state[a][key], theirs.optimizer.state[b][key]), (name, key)


def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    saved, plain, loaded = new_state(0, True), new_state(0, True), new_state(1, True)
    begin_saving(saved, tmp_path).finish()
    load_state(loaded, tmp_path)
    for state in (saved, plain, loaded):
        one_step(state)
    for other in (saved, loaded):
        for a, b in zip(plain.engine.model.parameters(), other.engine.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("qk_layernorm", [True, False])
def test_megatron_with_the_other_spec_finds_its_extra_states(tmp_path: Path, qk_layernorm: bool) -> None:
    begin_saving(new_state(0, True, qk_layernorm=qk_layernorm, num_layers=2), tmp_path).finish()
    names = ["core_attention", "linear_qkv", "linear_proj", *(["q_layernorm", "k_layernorm"] if qk_layernorm else [])]
    assert_extra_states_load(tmp_path, [*(f"self_attention.{name}" for name in names), "mlp.linear_fc1"], layers=2)
    with pytest.raises(CheckpointException, match="no_such_module"):
        assert_extra_states_load(tmp_path, ["no_such_module"], layers=2)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def scramble(file: Path) -> None:
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    begin_saving(new_state(0, True), folder).finish()
    return folder


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt", "metadata.json"])
@pytest.mark.parametrize("damage", [cut, scramble, Path.unlink, lambda file: file.write_bytes(b"")])
def test_any_damage_ends_in_one_line_that_names_file_and_remedy(
    saved: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """torch wraps what it meets in an exception that is no Exception."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if not (tmp_path / name).exists():
        pytest.skip(f"this megatron-core writes no {name}")
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match="copy it again, or write the number") as caught:
        load_state(new_state(1, True), tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    if name != "metadata.json":  # without it megatron-core says of the folder that it is no checkpoint
        assert name in message


def test_a_checkpoint_of_other_tensors_or_of_another_program_is_one_line_too(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be resumed \(.*shape.*\): copy it again") as caught:
        load_state(new_state(0, True, hidden_size=32), saved)
    assert "\n" not in str(caught.value)
    from megatron.core import dist_checkpointing

    with device_neutral_cuda():
        dist_checkpointing.save(new_state(0, True).engine.state(), str(tmp_path))  # no position, no generators
    with pytest.raises(CheckpointError, match=r"cannot be resumed \(KeyError: 'data_loader'\)"):
        load_state(new_state(0, True), tmp_path)


def test_what_stops_a_block_is_explained_but_for_our_own_errors_and_interrupts() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, cause in (
        (full, r"OSError: \[Errno 28\] No space left on device"),
        (CheckpointException("save", {3: (full, None)}), r"OSError: \[Errno 28\] No space left on device"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (ValueError(), "ValueError"),
    ):
        wanted = rf"^x cannot be written \({cause}\): free space$"
        with pytest.raises(CheckpointError, match=wanted), explained("x cannot be written", "free space"):
            raise error
    for error in (ConfigError("own words"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, explained("x", "y"):
            raise error
        assert caught.value is error


SAVE_TWICE = """
import multiprocessing, pathlib, sys
import torch
torch.set_num_threads(1)
from unit.training.test_checkpoint import new_state
from megatron_multiverse.training.checkpoint import begin_saving
import psutil
if __name__ == "__main__":
    for name in ("a", "b"):
        folder = pathlib.Path(sys.argv[1], name)
        folder.mkdir()
        begin_saving(new_state(0, True), folder).finish()
    print(len([child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]))
"""


def test_saving_leaves_no_process_behind(tmp_path: Path) -> None:
    """megatron-core's own queue of results is a server process, which would go on when the run is killed."""
    script = tmp_path / "save_twice.py"
    script.write_text(SAVE_TWICE)
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"},
    )  # fmt: skip
    assert done.stdout.split() == ["0"]
    assert (tmp_path / "b" / "metadata.json").is_file()
