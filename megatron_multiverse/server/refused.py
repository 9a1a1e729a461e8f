"""Fields of OpenAI, vLLM, SGLang and Megatron that are not served, with the values that ask for nothing and are taken.

Those that change no answer (metadata, request_id, store, ...) are not listed: they are ignored.
"""

from __future__ import annotations

from typing import Any

Refused = dict[str, tuple[Any, ...]]
"""Name -> values that ask for nothing."""

REFUSED: Refused = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "debug_fname": (),
    "ec_transfer_params": (),
    "images_config": ({},),
    "input_embeds": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "lora_path": (),
    "media_io_kwargs": ({},),
    "multi_modal_data": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "session_params": (),
    "stop_regex": ([],),
    "stream_interval": (1,),
    "streaming_interval": (1,),
    "structural_tag": (),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""Of all routes that generate text."""

CHAT: Refused = {
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "input_ids": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning": (),
    "reasoning_effort": (),
    "return_prompt_text": (False,),
    "skip_prompt_log_probs": (True,),
    "stream_reasoning": (True,),
    "task": (),
    "thinking": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Of chat, beside those."""

MESSAGE: Refused = {"audio": (), "function_call": (), "refusal": ("",), "tools": ([],)}
"""Of a turn of a chat."""

GENERATE: Refused = {
    "audio_data": (),
    "image_data": (),
    "logprob_start_len": (-1,),
    "max_thinking_tokens": (),
    "positional_embed_overrides": (),
    "priority": (0,),  # with SGLang a larger number comes first; sampling_params take vLLM's
    "return_entropy": (False,),
    "return_flat_raw_top_logprobs": (False,),
    "return_indexer_topk": (False,),
    "return_sampling_mask": (False,),
    "stream": (False,),
    "token_ids_logprob": (),
    "video_data": (),
}
"""Of /generate, beside `REFUSED`."""

SAMPLING: Refused = {
    "beam_width": (1,),
    "logprobs": (),
    "max_completion_tokens": (),
    "max_tokens": (),
}
"""Of its `sampling_params`, beside `REFUSED`: names of the other routes, which SGLang does not know there."""

API: Refused = {
    "beam_width": (),
    "max_len": (),
    "prevent_newline_after_colon": (False,),
    "sentences": (),
    "stop_on_double_eol": (False,),
    "top_p_bound": (0, 0.0),
    "top_p_decay": (0, 0.0),
}
"""Of Megatron's `PUT /api`, beside `REFUSED`; Megatron drops most of them."""

ELSEWHERE: Refused = {
    "add_BOS": (False,),
    "add_generation_prompt": (True, False),
    "add_special_tokens": (False,),
    "cache_salt": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "ebnf": (),
    "echo": (False,),
    "extra_key": (),
    "frequency_penalty": (0,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "input_ids": ("", []),
    "json_schema": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_new_tokens": (),
    "max_tokens": (),
    "messages": ("", []),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "min_tokens": (0,),
    "multiverse": ({},),
    "n": (1,),
    "no_stop_trim": (False,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "prevent_retokenization": (False,),
    "prompt": ("", []),
    "prompts": ("", []),
    "random_seed": (),
    "regex": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_logprob": (False,),
    "return_raw_text": (False,),
    "return_text_in_logprobs": (False,),
    "return_token_ids": (False,),
    "return_tokenized_data": (False,),
    "return_tokens_as_token_ids": (False,),
    "sampling_params": ({},),
    "sampling_seed": (),
    "seed": (),
    "separate_reasoning": (False,),
    "stop": ([], ""),
    "stop_on_eol": (False,),
    "stop_token": (),
    "stop_token_ids": ([],),
    "stream": (False,),
    "structured_outputs": ({},),
    "temperature": (1,),
    "text": ("", []),
    "tokens_to_generate": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "top_logprobs_num": (0,),
    "top_p": (1,),
}
"""What some routes of this server take, for the others: a client that takes one route for another is to hear of it."""

_SAME = (
    ("max_tokens", "max_completion_tokens", "max_new_tokens", "tokens_to_generate"),
    ("min_tokens", "min_new_tokens"),
    ("seed", "sampling_seed", "random_seed"),
    ("prompt", "prompts", "text", "input_ids", "messages"),
    ("add_BOS", "add_special_tokens"),
)
ALIKE = {name: tuple(other for other in group if other != name) for group in _SAME for name in group} | {
    # Whether log-probabilities come; in /v1/completions with how many alternatives, which others ask for apart.
    "logprobs": ("return_logprob", "top_logprobs_num"),
    "return_logprob": ("logprobs",),
    "top_logprobs": ("top_logprobs_num", "logprobs"),
    "top_logprobs_num": ("top_logprobs", "logprobs"),
    # A text is no token, but the end of a line is a text.
    "stop_on_eol": ("stop",),
    "stop_token": ("stop_token_ids",),
    "stop_token_ids": ("stop_token",),
}
"""Name of a field -> those that ask for the same, or nearly so, on other routes, the nearest first."""
