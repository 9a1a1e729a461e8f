from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_multiverse.config import LayerConfig
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.rope import inverse_frequencies, rope_angles, rope_reference
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.cpu import device_neutral_cuda
from megatron_multiverse.model.families import preset, qwen2, qwen3
from megatron_multiverse.model.gpt import build_gpt_model, transformer_config
from megatron_multiverse.model.layer_specs import get_final_norm, get_gpt_layer_spec
from megatron_multiverse.model.layers import CoreAttention, PositionIdRotary, RMSNorm, residual_add


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


@pytest.mark.parametrize("family", [qwen2, qwen3])
def test_self_attention_rotates_as_megatron_core_does(family) -> None:
    """q, k and v of our layer against megatron-core's own split and unfused rotation, outputs and weight gradient."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.transformer.attention import SelfAttention

    config = family(
        num_layers=1, hidden_size=32, ffn_hidden_size=32, num_attention_heads=6, num_query_groups=2, kv_channels=8,
        vocab_size=16, max_sequence_length=16,
    )  # fmt: skip
    layer = build_gpt_model(config).decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 131_072, (2, 5), generator=generator)
    x = torch.randn(5, 2, 32, generator=generator)
    layer._rotary_table = PositionIdRotary(8, 1e6).table(ids)
    got = layer.get_query_key_value_tensors(x)
    query, key, value = SelfAttention.get_query_key_value_tensors(layer, x)
    angles = rope_angles(ids, inverse_frequencies(8, 1e6, "cpu", torch.float32))
    mcore = transformer_config(config, torch.float32)
    for b in range(2):  # megatron-core's table has no batch dimension
        want = [apply_rotary_pos_emb(y[:, b : b + 1], angles[:, b : b + 1], mcore, cp_group=object())
                for y in (query, key)]  # fmt: skip
        for mine, theirs in zip(got, (*want, value[:, b : b + 1]), strict=True):
            torch.testing.assert_close(mine[:, b : b + 1], theirs, rtol=0, atol=2e-6)
    assert (got[0] - query).abs().max() > 0.1


def test_angles_are_float32_exact_up_to_128k() -> None:
    """The table equals the float64 cosines of the angles that float32 arithmetic gives (what transformers computes)."""
    ids = torch.cat((torch.arange(64), torch.arange(131_072 - 64, 131_072)))[None]
    table = PositionIdRotary(128, 1e6).table(ids)
    assert table.dtype == torch.float32
    angles = (ids[0, :, None].float() * inverse_frequencies(128, 1e6, "cpu", torch.float32)).double()
    torch.testing.assert_close(table[0].double(), torch.cat((angles.cos(), angles.sin()), -1), rtol=0, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PositionIdRotary(128, 1e6).table(ids), table)


def test_positions_come_from_the_pass_alone() -> None:
    """Two passes with the same params object and other ids differ; missing ids and a lone layer are explained."""
    model = build_gpt_model(preset("tiny"))
    ids = torch.arange(8)[None]
    params = LayoutParams.causal(ids)
    first, second, again = (model(ids, k * ids, None, packed_seq_params=params) for k in (1, 2, 1))
    assert torch.equal(first, again) and not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(ConfigError, match="position_ids are missing"):
        model(ids, None, None, packed_seq_params=params)
    with pytest.raises(ConfigError, match="no rotary_table"):
        model.decoder(torch.zeros(8, 1, 64), None, packed_seq_params=LayoutParams.causal(ids))


def test_what_our_layers_do_not_have_is_refused() -> None:
    """megatron-core's own defaults for dropout among it, and a rotation beside ours."""
    for name, value in (("hidden_dropout", 0.1), ("attention_dropout", 0.1), ("window_size", (2, 0))):
        config = transformer_config(preset("tiny"), torch.float32)
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=rf"have no {name} \(given: {name} "):
            CoreAttention(config, 1, None, "self")
    model = build_gpt_model(preset("tiny"))
    ids, x = torch.arange(8)[None], torch.zeros(8, 1, 64)
    params = LayoutParams.causal(ids)
    params.rotary_table = PositionIdRotary(model.config.kv_channels, 1e6).table(ids)
    with pytest.raises(ConfigError, match="position_embedding_type='none'"):
        model.decoder(x, None, rotary_pos_emb=torch.zeros(8, 1, 1, model.config.kv_channels), packed_seq_params=params)
    attention = model.decoder.layers[0].self_attention.core_attention
    with pytest.raises(ConfigError, match="no attention_bias"):
        attention(x, x, x, None, attention_bias=x, packed_seq_params=params)
    with pytest.raises(ConfigError, match="attention_backend 'flash4' cannot run here"):
        build_gpt_model(preset("tiny"), layers=LayerConfig(attention_backend="flash4"))
    for impl in ("auto", "transformer_engin"):
        for function in (get_gpt_layer_spec, get_final_norm):
            with pytest.raises(ConfigError, match=f"{impl!r}, allowed: local, transformer_engine"):
                function(impl)


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


def test_attention_runs_in_the_dtype_of_autocast() -> None:
    """megatron-core's linear layer with a bias gives float32 there."""
    model = build_gpt_model(qwen2(
        num_layers=1, hidden_size=32, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=2,
        vocab_size=16, max_sequence_length=16,
    ))  # fmt: skip
    seen = []

    class Params(LayoutParams):
        def attend(self, query, key, value, **options):
            seen.extend(x.dtype for x in (query, key, value))
            return super().attend(query, key, value, **options)

    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, ids, None, packed_seq_params=Params.from_labels(ids.int()))
    assert seen == [torch.bfloat16] * 3
