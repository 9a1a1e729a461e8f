from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.rope import inverse_frequencies, rope_angles, rope_reference
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.model.families import preset
from megatron_multiverse.model.gpt import transformer_config
from megatron_multiverse.model.norm import RMSNorm
from megatron_multiverse.model.residual import residual_add
from megatron_multiverse.model.rotary import PositionIdRotary


def test_rope_reference_is_a_rotation_by_position_times_frequency() -> None:
    ids = torch.tensor([[0, 3, 3, 1000]])
    x = torch.randn(4, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inv_freq = inverse_frequencies(8, 1e4, "cpu", torch.float64)
    got = rope_reference(x, rope_angles(ids, inv_freq))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = ids[0][:, None] * 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turns = torch.polar(torch.ones_like(angles), angles)
    want = pairs * turns[:, None, None, :]
    torch.testing.assert_close(got, torch.cat((want.real, want.imag), -1), rtol=0, atol=1e-12)


def test_megatron_core_applies_the_table_as_the_reference_does() -> None:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    rotary = PositionIdRotary(8, 1e6)
    rotary.set_position_ids(torch.tensor([[5, 0, 9]]))
    table = rotary(0)
    x = torch.randn(3, 1, 2, 8)
    config = transformer_config(preset("tiny"), torch.float32)
    got = apply_rotary_pos_emb(x, table, config, cp_group=object())
    assert torch.equal(got, rope_reference(x, table))
    with pytest.raises(ConfigError, match="position_ids are missing"):
        rotary(0)  # used up: a stale table would be a silent error


def test_norm_and_residual_keep_their_precision() -> None:
    norm = RMSNorm(transformer_config(preset("tiny"), torch.float64), 16, eps=1e-6)
    x = torch.randn(3, 16, dtype=torch.float64)
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), want, rtol=1e-13, atol=0)
    stream = residual_add(True, False)((torch.ones(2, dtype=torch.bfloat16), None), torch.full((2,), 1e-4), 0.0)
    assert stream.dtype == torch.float32 and stream[0] > 1


def test_cuda_calls_are_neutral_inside_the_block_only() -> None:
    if torch.cuda.is_available():
        pytest.skip("with CUDA the block does nothing")
    before = torch.cuda.current_device
    with pytest.raises(KeyError), device_neutral_cuda():
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
        raise KeyError
    assert torch.cuda.current_device is before


def test_building_a_model_prints_no_warnings() -> None:
    code = (
        "from megatron_multiverse.model.gpt import build_gpt_model; "
        "from megatron_multiverse.model.families import preset; build_gpt_model(preset('tiny'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == ""
