"""Everything of a Hugging Face folder but config.json and the weights: tokenizer, generation defaults, model card.

They travel along: a megatron-core checkpoint carries the files of the folder it came from, so that the way back needs
nothing else and tools find the tokenizer beside the weights.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_multiverse
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.structure import TAGS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
GENERATION_FILE, CARD_FILE = "generation_config.json", "README.md"


def copy_assets(source: str | Path, target: str | Path) -> list[str]:
    """Copy tokenizer and generation defaults, as far as they exist; returns the names of the copied files."""
    names = [name for name in (*TOKENIZER_FILES, GENERATION_FILE) if (Path(source) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names


def save_tokenizer(tokenizer: HuggingFaceTokenizer, folder: str | Path) -> None:
    """Write a tokenizer over the one in `folder`, and remove files that would contradict it."""
    for name in TOKENIZER_FILES:
        (Path(folder) / name).unlink(missing_ok=True)
    tokenizer.save(folder)


def write_generation_config(folder: str | Path) -> None:
    """Write generation_config.json from the tokenizer in `folder`, unless there is one or the tokenizer is missing.

    Without it servers do not know where an answer ends.
    """
    path = Path(folder) / GENERATION_FILE
    if path.is_file() or not (Path(folder) / "tokenizer.json").is_file():
        return
    tokenizer = HuggingFaceTokenizer(folder)
    if tokenizer.eod is not None:
        values = {"eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad, "do_sample": False}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_model_card(
    folder: str | Path, name: str, config: ModelConfig, architecture: str, provenance: Mapping[str, Any]
) -> None:
    """Write README.md: what the model is, how to use it, where it comes from.

    Args:
        folder: the export.
        name: title.
        config: shape of the model.
        architecture: transformers' class.
        provenance: rows of the table of origin, e.g. {"source": ..., "iteration": ...}; None values are left out.
    """
    known = {key: value for key, value in provenance.items() if value is not None}
    known["converted with"] = f"megatron-multiverse {megatron_multiverse.__version__}"
    known["converted on"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    origin = "\n".join(f"| {key} | {_cell(value)} |" for key, value in known.items())
    text = _CARD.format(
        name=name, architecture=architecture, parameters=f"{config.num_parameters:,}", layers=config.num_layers,
        hidden=config.hidden_size, vocab=config.vocab_size, context=config.max_sequence_length, origin=origin,
        structure=_TAGGED.format(architecture=architecture) if _knows_tags(folder) else _UNTAGGED,
    )  # fmt: skip
    (Path(folder) / CARD_FILE).write_text(text, encoding="utf-8")


def _knows_tags(folder: str | Path) -> bool:
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return False
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
    return set(TAGS) <= {token["content"] for token in added}


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


_TAGGED = """\
The vocabulary has the twelve tags of [Multiverse](https://arxiv.org/abs/2506.09991) as special tokens: `<Think>`,
`<Parallel>`, `<Goal>`, `<Outline>`, `<Path>`, `<Conclusion>` and their closing forms. Any server that runs
{architecture} decodes such text one token after the other (pass `skip_special_tokens=False` to see the tags). The
engine of megatron-multiverse decodes the paths of a block side by side, with the positions and visibility that the
model was trained with."""

_UNTAGGED = "The vocabulary has no structure tags; `tools/convert_checkpoint.py --add-control-tokens` adds them."

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- multiverse
- parallel-generation
---

# {name}

{structure}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

| Shape | |
|---|---|
| architecture | {architecture} |
| parameters | {parameters} |
| layers, hidden size | {layers}, {hidden} |
| rows of the vocabulary | {vocab} |
| longest sequence | {context} |

| Origin | |
|---|---|
{origin}
"""
