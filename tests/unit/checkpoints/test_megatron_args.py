"""Megatron-LM's args: what they say is understood or refused, never guessed."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_multiverse.checkpoints.formats.megatron_args import args_from_config, config_from_args
from megatron_multiverse.checkpoints.formats.megatron_args_names import has_no_effect
from megatron_multiverse.config import RopeScaling
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.model.layers import PositionIdRotary
from tests.unit.checkpoints.test_convert import hf_folder, run
from tests.unit.checkpoints.test_damage import edit_config
from tests.unit.checkpoints.test_names import shape

LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0)


def args(**changes: Any) -> Namespace:
    made = args_from_config(shape(False), padded_vocab_size=50, tp=1, pp=1, dtype=torch.bfloat16)
    return Namespace(**{**vars(made), **changes})


def strip(folder: Path, **changes: Any) -> Path:
    """Leave only what Megatron-LM itself would have written, with other arguments."""
    for name in ("conversion.json", "model_config.json", "release/checksums.json"):
        (folder / name).unlink()
    file = folder / "release/common.pt"
    content = torch.load(file, weights_only=False)
    vars(content["args"]).update(changes)
    torch.save(content, file)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_what_is_written_is_read_back(tied: bool, scaling: RopeScaling | None) -> None:
    config = shape(tied, rope_scaling=scaling, qk_layernorm=True, rotary_base=5e5)
    made = args_from_config(config, padded_vocab_size=50, tp=2, pp=1, dtype=torch.bfloat16)
    assert config_from_args(made, where="x") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p is True"),
        ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor is 4; some versions"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor is 32.0, but Megatron-LM's GPT"),
        ({"rotary_percent": 0.5}, "rotary_percent is 0.5"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True"),
        ({"window_size": (128, 0)}, "window_size is"),
        ({"qk_l2_norm": True}, "qk_l2_norm is True"),
        ({"no_rope_freq": 4}, "no_rope_freq is 4"),
        ({"softmax_type": "off-by-one"}, "softmax_type is 'off-by-one'"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value is 7.0"),
        ({"squared_relu": True, "swiglu": False}, "swiglu is False"),
        ({"multi_latent_attention": True}, "multi_latent_attention is True"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is 1"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type is 'yarn'"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"a_switch_of_tomorrow": 3}, "a_switch_of_tomorrow is 3.*--model-config"),
        ({"num_layers": None}, "args.num_layers: expected int, got None"),
        ({"norm_epsilon": "1e-6"}, "layernorm_epsilon: expected float, got '1e-6'"),
    ],
)
def test_other_models_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_args(args(**changes), where="x")


def test_a_missing_argument_is_named() -> None:
    incomplete = args()
    del incomplete.kv_channels
    with pytest.raises(ConfigError, match="args has no kv_channels; give --model-config"):
        config_from_args(incomplete, where="x")


def test_settings_of_a_run_have_no_effect() -> None:
    """Arguments that Megatron-LM's parser always sets, and what a long run adds."""
    defaults = {
        "adam_beta1": 0.9, "attention_backend": "auto", "attention_dropout": 0.1, "bf16": True,
        "bias_swiglu_fusion": True,
        "ckpt_format": "torch_dist", "context_parallel_size": 2, "cp_comm_type": ["p2p"], "data_path": ["a"],
        "distributed_backend": "nccl", "eval_iters": 100, "fp8": "hybrid", "global_batch_size": 512, "lr": 1e-5,
        "hidden_dropout": 0.1, "hybrid_attention_ratio": 0.0, "init_method_std": 0.02, "kv_lora_rank": 32,
        "lr_decay_style": "cosine", "make_vocab_size_divisible_by": 128, "mamba_state_dim": 128, "moe_router_topk": 2,
        "moe_token_dispatcher_type": "allgather", "optimizer": "adam", "recompute_granularity": "full", "seed": 1234,
        "sequence_parallel": True, "tokenizer_model": "x", "train_iters": 10, "transformer_impl": "transformer_engine",
        "use_distributed_optimizer": True, "wandb_project": "x", "weight_decay": 0.1, "window_size": None,
        "yarn_correction_range_round_to_int": True,
    }  # fmt: skip
    assert config_from_args(args(**defaults), where="x") == shape(False)


COMPUTING = {
    "activation_func_clamp_value", "add_bias_linear", "add_qkv_bias", "apply_residual_connection_post_layernorm",
    "attention_output_gate", "ffn_hidden_size", "gated_linear_unit", "glu_linear_offset", "hidden_size", "kv_channels",
    "layernorm_epsilon", "layernorm_zero_centered_gamma", "linear_attention_freq", "mtp_num_layers",
    "multi_latent_attention", "no_rope_freq", "normalization", "num_attention_heads", "num_layers", "num_query_groups",
    "qk_l2_norm", "qk_layernorm", "rotary_interleaved", "softmax_scale", "softmax_type", "window_size",
    "experimental_attention_variant", "is_hybrid_model", "mrope_section", "activation_func",
}  # fmt: skip


def test_no_computing_setting_of_megatron_core_counts_as_harmless() -> None:
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert len(fields & COMPUTING) > 25
    assert not [name for name in COMPUTING if has_no_effect(name)]


@pytest.mark.parametrize(
    "changes", [{"apply_layernorm_1p": True}, {"rotary_seq_len_interpolation_factor": 4}, {"qk_l2_norm": True}]
)
def test_a_checkpoint_of_megatron_with_such_args_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = hf_folder(tmp_path / "hf", "llama", True)
    run(source, tmp_path / "mcore")
    strip(tmp_path / "mcore", **changes)
    with pytest.raises(ConfigError, match=rf"args\.{next(iter(changes))} is"):
        run(tmp_path / "mcore", tmp_path / "out", "mcore", "hf")
    run(tmp_path / "mcore", tmp_path / "out", "mcore", "hf", model_config=str(source))


@pytest.mark.parametrize(
    "changes", [{"hybrid_layer_pattern": "*-*-"}, {"hybrid_override_pattern": "M*-"}, {"is_hybrid_model": True}]
)
def test_hybrid_models_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(hf_folder(tmp_path / "hf", "llama", True), tmp_path / "mcore")
    strip(tmp_path / "mcore", **changes)
    with pytest.raises(ConfigError, match=r"HybridModel \(layer pattern .*gpt_hybrid_conversion"):
        run(tmp_path / "mcore", tmp_path / "out", "mcore", "hf")


def test_rotary_scalings_are_stated_as_megatron_computes_them() -> None:
    """Against megatron-core's own rotary embedding: positions / factor for linear, its constants for Llama 3."""

    def angles(rotary: RotaryEmbedding) -> torch.Tensor:
        return rotary.get_freqs_non_repeated(300)

    def ours(scaling: RopeScaling) -> torch.Tensor:
        table = PositionIdRotary(16, 1e4, scaling=scaling)
        table.table(torch.arange(300)[None])
        return torch.outer(torch.arange(300.0), table._inv_freq)

    basics = {"kv_channels": 16, "rotary_percent": 1.0, "rotary_base": 10000, "use_cpu_initialization": True}
    linear = RopeScaling(rope_type="linear", factor=4.0)
    for scaling, names in ((linear, ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor")),
                           (LLAMA3, ("use_rope_scaling", "rope_scaling"))):  # fmt: skip
        written = vars(
            args_from_config(shape(True, rope_scaling=scaling), padded_vocab_size=50, tp=1, pp=1, dtype=None)
        )
        theirs = RotaryEmbedding(**basics, **{names[1]: written[names[0]]})
        torch.testing.assert_close(angles(theirs), ours(scaling), rtol=1e-5, atol=1e-6)
    assert written["rotary_seq_len_interpolation_factor"] is None and written["rope_scaling_factor"] == 8.0


def test_scalings_that_megatron_cannot_state_are_refused_before_anything_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = hf_folder(tmp_path / "hf", "llama", True)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit_config(source, rope_parameters={**rope, "original_max_position_embeddings": 32})
    for form in ("torch_dist", "torch"):
        with pytest.raises(ConfigError, match="no megatron-core checkpoint can say it"):
            run(source, tmp_path / "out", ckpt_format=form)
    assert not (tmp_path / "out.partial").exists()
    args_from_config(
        shape(True, rope_scaling=dataclasses.replace(LLAMA3, factor=32.0)), padded_vocab_size=50, tp=1, pp=1, dtype=None
    )
    assert "ignores --rope-scaling-factor" in caplog.text
