"""The Multiverse mask inside transformers: `attn_implementation="multiverse"`.

A plain AutoModelForCausalLM then trains or scores with the visibility, positions and loss of the structure package:

    from megatron_multiverse.model.transformers_attention import model_inputs, register_attention
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="multiverse")
    inputs = model_inputs(prompt_ids, response_ids, tokenizer.structure_vocab)
    loss = model(**inputs).loss

transformers hands keyword arguments it does not know (here `r`, the visibility labels) to every layer's attention.
With its Trainer set `remove_unused_columns=False`, or the column `r` is dropped. Decoding in parallel branches is
the engine's business; `model.set_attn_implementation("sdpa")` lets transformers generate as usual.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.kernels.multiverse_attention import AttentionLayout, multiverse_attention
from megatron_multiverse.structure import StructureVocab, lay_out, parse

NAME = "multiverse"
IGNORED_LABEL = -100
# The layout of a forward pass, by its labels: the first layer makes it, the others use it. It goes when r goes or the
# next pass begins: r may be a buffer that the caller fills anew for each pass, which the tensor itself does not tell.
_layouts: MutableMapping[Tensor, AttentionLayout] = WeakTensorKeyDictionary()


def register_attention() -> None:
    """Make `attn_implementation="multiverse"` known to transformers (4.53 or newer). Calling it twice is harmless.

    Raises:
        ConfigError: transformers is older.
    """
    import transformers

    try:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ConfigError(
            f"transformers {transformers.__version__} lets nobody register attention masks: install 4.53 or newer"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _padding_only)


def model_inputs(
    prompt_ids: Sequence[int], response_ids: Sequence[int], vocab: StructureVocab, *, train_forced_tokens: bool = False
) -> dict[str, Tensor]:
    """What one sample's forward pass takes: input_ids, position_ids, r and labels, each int64 [1, s].

    Args:
        prompt_ids: tokens of the prompt.
        response_ids: tokens of the response, tags included.
        vocab: ids of the tags.
        train_forced_tokens: also put labels on what the engine writes.

    Returns:
        Labels are -100 where nothing is trained; transformers shifts them itself.

    Raises:
        StructureError: the response breaks the grammar.
    """
    ids = [*prompt_ids, *response_ids]
    layout = lay_out(parse(ids, vocab, prompt_length=len(prompt_ids)))
    input_ids = torch.tensor([ids])
    trained = torch.from_numpy(layout.loss_mask(train_forced_tokens=train_forced_tokens))
    return {
        "input_ids": input_ids,
        "position_ids": torch.from_numpy(layout.position_ids).long()[None],
        "r": torch.from_numpy(layout.r).long()[None],
        "labels": input_ids.masked_fill(~trained, IGNORED_LABEL),
    }


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    r: Tensor | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        module: the attention layer (unused; part of the interface).
        query: [b, h, s, d], rotated.
        key: [b, g, s, d], rotated.
        value: [b, g, s, d].
        attention_mask: must be None; padding is a document of its own in r.
        scaling: factor on the scores.
        dropout: must be 0.
        r: int labels [b, s] (structure.Layout.r), handed through the model's forward.
        sliding_window: must be None.
        position_ids: int [b, s] or [1, s], handed through by transformers; only looked at.

    Returns:
        [b, s, h, d] and no weights.

    Raises:
        ConfigError: r is missing or does not fit, or the model asks for what the rule does not have.
    """
    if r is None:
        raise ConfigError(
            'attn_implementation="multiverse" needs r [b, s] beside input_ids and position_ids (model_inputs makes '
            'them); for plain causal attention call model.set_attn_implementation("sdpa")'
        )
    want = (query.shape[0], key.shape[2])
    if r.shape != want or query.shape[2] != key.shape[2]:
        raise ConfigError(
            f"r must be [b, s] = {want} over the whole sequence, got {tuple(r.shape)} for {query.shape[2]} queries; "
            "decoding with a cache is not supported, pass use_cache=False"
        )
    if attention_mask is not None or dropout or sliding_window is not None:
        raise ConfigError(
            "the Multiverse mask goes with neither padding in attention_mask (make padding a document of its own, "
            f"structure.padding_layout) nor dropout ({dropout}) nor a sliding window ({sliding_window})"
        )
    if r not in _layouts:
        _check_positions(r, position_ids)
        # The dictionary is weak in its keys only: a value that referred to r itself would keep the entry for ever.
        _layouts[r] = AttentionLayout(r.detach())
    out = multiverse_attention(query, key, value, _layouts[r], softmax_scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _check_positions(r: Tensor, position_ids: Tensor | None) -> None:
    """transformers counts positions from 0 to s - 1 where it is given none; with blocks or packed documents, whose
    labels do not count likewise, positions begin again somewhere.

    Raises:
        ConfigError: the positions were left out.
    """
    index = torch.arange(r.shape[1], device=r.device)
    if position_ids is not None and bool((position_ids == index).all()) and not bool((r == index).all()):
        raise ConfigError(
            "position_ids count from 0 to s - 1, but r says that there are paths or several documents: pass the "
            "position_ids that model_inputs makes beside r"
        )


def _padding_only(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask that transformers asks for before the first layer: none, unless there is padding (refused later).

    transformers' own masks would take every step back in the positions for the start of a packed document. Since it
    asks once for each forward pass, this is where the layouts of the pass before are forgotten.
    """
    _layouts.clear()
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask
