"""Arguments of Megatron-LM that leave what a dense GPT model computes for given ids alone.

Every other argument that is set is understood by `megatron_args.py` or refused. The names are those of Megatron-LM
0.12 to 0.19; whole groups are named by how they begin. Some only matter beside a switch that is refused (experts,
latent and linear attention, hybrid models).
"""

from __future__ import annotations

_BEGINNINGS = """
    account_for_ accumulate activation_offload_ adam_ adlr_ align_ allow_ app_tag apply_rope_fusion apply_wd async_
    attention_backend auto_ barrier_ batch_ bert_ bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion biencoder_
    block_ cache_ calc_ft_ calculate_ check_ checkpoint_activations ckpt_ classes_ clip_ clone_ config_ consumed_
    context_parallel cp_ cpu_ create_ cross_entropy_ cuda_graph data_ dataloader_ ddp_ decode_only_ decoder_first_
    decoder_last_ decoder_seq_ decoder_tp_ decoupled_ decrease_ default_ defer_ delay_ delta_offload_ deprecated_
    deterministic_ dino_ disable_ dist_ distrib_ distribute_ distributed_ dsa_ dump_ embedding_init_ embedding_path
    empty_ enable_autocast enable_chunked_ enable_cuda_graph enable_experimental enable_ft_ enable_full_sharding
    enable_gloo_ enable_msc enable_one_ encoder_num_layers encoder_pipeline_ encoder_seq_ encoder_tensor_ end_ eod_
    error_ eval_ evidence_ exit_ exp_avg experiment_ expert_ export_ external_ fake_process fault_ fim_
    fine_grained_ finetune first_last_layers_bf16 flash_decode fp16 fp32_ fp4 fp8 freeze_ fsdp_ ft_ full_ fused_
    gdp_ global_ goodput_ grad_ gradient_ grpo_ gtp_ head_lr_ hierarchical_ high_ hybrid_context hysteresis ict_
    img_ increase_ indexer_ inference_ init_method_ init_model_ initial_ inprocess_ is_instruction iter_ iteration
    keep_ langrl_ lazy_ legacy_ lion_ load local_ log_ logging_ logits_ loss_ lr main_grads_ main_params_
    make_vocab_ mamba_ manual_ mask_ masked_softmax_ max_seqlen max_tokens megatron_fsdp_ memory_ merge_file mhc_
    micro_ microbatch_ mid_level_ min_ mlp_chunks_ mmap_ mock_ model_parallel_ moe_ msc_ mscale mtp_loss_ multiple_
    muon_ mup_ nccl_ no_load_ no_persist_ no_save_ no_weight_decay non_persistent_ null_tokenizer num_channels
    num_classes num_dataset_ num_distributed_ num_layers_at_ num_layers_in_ num_layers_per_virtual num_speculative_
    num_virtual_ num_workers nvtx_ object_ offload_ offset_sampling one_logger_ onnx_ optimizer otel_ outer_dp_
    output_bert overlap_ override_ patch_ per_dataset_ per_split_ perform_ persist_ phase_ pin_ pipeline_ preserve_
    pretrained_checkpoint profile query_in_ rampup_ recompute_ record_ refit_ replication_ rerun_ reset_ result_
    retriever_ retro_ reuse_ rl_ run_workload_ sample_rate save scatter_ seed seq_length sequence_parallel set_ sft
    sgd_ sharp_ short_seq_ skip_ skipped_ slice_ split start_ straggler_ strict_ suggested_ swin_ te_rng_
    tensor_model_ tensorboard_ test_data_ tiktoken_ timing_ titles_ tokenizer_ torch_fsdp tp_comm_ trace_ train
    transformer_impl transformer_pipeline_ use_checkpoint_ use_cpu_ use_custom_fsdp use_dist use_flash_attn
    use_fused_ use_gloo_ use_grouped_gemm_ use_layer_ use_legacy_static use_mamba_mem_ use_megatron_fsdp use_mp_
    use_one_ use_persistent_ use_precision_ use_pytorch_ use_ring_ use_sharp use_te_activation use_te_rng
    use_tokenizer_ use_torch_fsdp use_torch_optimizer use_tp_ use_transformer_engine_op valid_ variable_ verify_
    virtual_ vision_ vocab_extra_ vocab_file wandb_ warmup_ weight_decay wgrad_ window_attn_ workload_ world_size
    yaml_cfg
"""
_NAMES = """
    add_position_embedding apply_query_key_layer_scaling attention_dropout attention_softmax_in_fp32 autocast_dtype
    bf16 bias_activation_fusion checkpoint_version flash_attention_version hidden_dropout kitchen_attention_backend
    kv_lora_rank linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
    linear_value_head_dim logit_dtype params_dtype q_lora_rank qk_clip qk_clip_alpha qk_clip_threshold qk_head_dim
    qk_pos_emb_head_dim rank relative_attention_max_distance relative_attention_num_buckets replication rope_type
    rotary_scaling_factor symmetric_ar_type te_precision_config_file test_mode tp_only_amax_red trust_remote_code
    use_mcore_models use_rotary_position_embeddings v_head_dim vocab_size warmup yarn_correction_range_round_to_int
"""
BEGINNINGS, NAMES = tuple(_BEGINNINGS.split()), frozenset(_NAMES.split())


def has_no_effect(name: str) -> bool:
    """Whether an argument of this name leaves what the model computes alone."""
    return name in NAMES or name.startswith(BEGINNINGS)
