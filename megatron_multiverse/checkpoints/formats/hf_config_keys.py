"""The keys of config.json (Qwen2, Qwen3, Llama) that may be set. Any other is refused where it is set."""

from __future__ import annotations

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Keys that have no default."""

_UNDERSTOOD = """
    architectures attention_bias dtype head_dim hidden_act layer_types max_position_embeddings mlp_bias model_type
    num_key_value_heads original_max_position_embeddings partial_rotary_factor rms_norm_eps rope_parameters rope_scaling
    rope_theta sliding_window tie_word_embeddings torch_dtype use_sliding_window
"""
UNDERSTOOD = frozenset((*REQUIRED, *_UNDERSTOOD.split()))
"""Keys that become part of the shape, or are refused for some of their values."""

_TRAINING = "attention_dropout gradient_checkpointing initializer_range max_window_layers pretraining_tp use_cache"
_GENERATION = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
_LIBRARY = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path attn_implementation
    chunk_size_feed_forward finetuning_task id2label label2id model_max_length name_or_path num_labels
    output_attentions output_hidden_states prefix problem_type return_dict task_specific_params tokenizer_class
    torchscript transformers_version trl_version unsloth_fixed unsloth_version use_bfloat16 use_return_dict
"""
WITHOUT_EFFECT = frozenset(f"{_TRAINING} {_GENERATION} {_LIBRARY}".split())
"""Keys that change nothing in what the model computes for given ids; so do all that end in _token_id."""
