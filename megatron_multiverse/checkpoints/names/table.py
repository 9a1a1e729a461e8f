"""What a family's name table is made of: which tensors there are, their shapes, and how they map.

A table has one `Row` per megatron-core parameter. `{i}` stands for the layer number. The rule of a row says how the
Hugging Face tensors make the megatron-core one and how tensor parallelism cuts it:

| rule       | megatron-core tensor                                  | cut for tensor parallelism        |
|------------|-------------------------------------------------------|-----------------------------------|
| replicated | the same                                              | not at all                        |
| vocab      | the same, rows padded                                 | rows                              |
| row        | the same                                              | columns (RowParallelLinear)       |
| qkv        | per group: the queries of the group, its key, its value | rows, evenly                    |
| gate_up    | gate above up                                         | rows of gate and of up separately |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_multiverse.config import ModelConfig
from megatron_multiverse.weight_names import fused_name

Rule = Literal["replicated", "vocab", "row", "qkv", "gate_up"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One megatron-core parameter of a family."""

    mcore: str
    """megatron-core's name (local layer spec)."""
    rule: Rule
    """How it is made and cut."""
    hf: tuple[tuple[str, str], ...]
    """Hugging Face tensors it is made of: (name, symbolic shape such as "q hidden")."""
    only: Literal["always", "untied", "biased"] = "always"
    """When it exists: always, with untied embeddings, with biases on every linear layer."""


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture, as data."""

    name: str
    """Name on our side."""
    model_type: str
    """`model_type` of its config.json."""
    architecture: str
    """Entry of `architectures` in its config.json."""
    add_qkv_bias: bool
    """Bias on query, key and value."""
    qk_layernorm: bool
    """RMSNorm on query and key heads."""
    defaults: tuple[tuple[str, object], ...]
    """What transformers assumes for keys that its config.json leaves out."""
    extra: tuple[tuple[str, object], ...]
    """Keys of config.json that an export sets besides the shape."""
    rows: tuple[Row, ...]
    """The name table."""
    add_bias_linear: bool = False
    """Whether models of the family may have biases on every linear layer (attention_bias with mlp_bias)."""


@dataclass(frozen=True)
class Entry:
    """A row with the layer number and the shapes filled in."""

    mcore: str
    rule: Rule
    hf: tuple[tuple[str, Shape], ...]
    shape: Shape
    """Shape of the whole megatron-core tensor, vocabulary padding included."""
    layer: int | None
    """Layer number, None for embedding, final norm and output layer."""


def entries(family: Family, config: ModelConfig) -> list[Entry]:
    """Every tensor of a model, in the order of the network: embedding, layers, final norm, output layer."""
    sizes = {
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "q": config.num_attention_heads * config.kv_channels,
        "kv": config.num_query_groups * config.kv_channels,
        "head": config.kv_channels,
        "vocab": config.vocab_size,
    }
    return [_entry(row, layer, sizes, config) for row, layer in _placed(family, config)]


def _placed(family: Family, config: ModelConfig) -> Iterator[tuple[Row, int | None]]:
    """Rows in network order, those of a layer once per layer."""
    exists = {
        "always": True,
        "untied": not config.share_embeddings_and_output_weights,
        "biased": config.add_bias_linear,
    }
    rows = [row for row in family.rows if exists[row.only]]
    layer_rows = [row for row in rows if "{i}" in row.mcore]
    expanded = False
    for row in rows:
        if "{i}" not in row.mcore:
            yield row, None
        elif not expanded:
            expanded = True
            yield from ((layer_row, i) for i in range(config.num_layers) for layer_row in layer_rows)


def _entry(row: Row, layer: int | None, sizes: dict[str, int], config: ModelConfig) -> Entry:
    hf = tuple((name.replace("{i}", str(layer)), tuple(sizes[d] for d in dims.split())) for name, dims in row.hf)
    rows = sum(shape[0] for _, shape in hf)
    return Entry(row.mcore.replace("{i}", str(layer)), row.rule, hf, (rows, *hf[0][1][1:]), layer)


def dist_key(entry: Entry) -> str:
    """Key of the tensor in a torch_dist checkpoint, where all layers are stacked into one tensor and the norms have
    the names of TransformerEngine's fused layers, whatever spec wrote it."""
    name = fused_name(entry.mcore)
    return name if entry.layer is None else name.replace(f".layers.{entry.layer}.", ".layers.", 1)
