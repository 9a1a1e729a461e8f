"""Everything of a Hugging Face folder but config.json and the weights: tokenizer, generation defaults, model card.

They travel along: a megatron-core checkpoint carries the files of the folder it came from, so that the way back needs
nothing else and tools find the tokenizer beside the weights.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import megatron_multiverse
from megatron_multiverse.checkpoints.formats.json_files import read_json_object, refuse_lfs_pointer
from megatron_multiverse.config import ModelConfig
from megatron_multiverse.data.generation_config import GENERATION_FILE
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.structure import TAGS

logger = logging.getLogger(__name__)

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
TEMPLATE_FOLDER = "additional_chat_templates"
"""Where transformers keeps the further ones of several chat templates."""
CARD_FILE = "README.md"
_SAMPLE = (
    "In the year 1234, Mr. Lee's 56 things   were\n\tf(x) = [7.89, -x] + 'caf\u00e9'  # 100%\n\nGo! It isn't in there."
)
"""Text whose pieces depend on how a tokenizer cuts words, digits, blanks and signs."""


def copy_assets(tokenizer: Path | None, folders: Iterable[Path], target: Path) -> list[str]:
    """Copy tokenizer and generation defaults, as far as they exist.

    Args:
        tokenizer: folder of the tokenizer, if there is one.
        folders: where the model's generation_config.json may lie; the first one counts, then the tokenizer's.
        target: where to.

    Returns:
        The names of the files that were copied.
    """
    files = asset_files(tokenizer, folders)
    for name, file in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)
    return list(files)


def asset_files(tokenizer: Path | None, folders: Iterable[Path]) -> dict[str, Path]:
    """The files that `copy_assets` copies, by the names that they get."""
    files: dict[str, Path] = {}
    own = [tokenizer] if tokenizer is not None else []
    for folder in own:
        found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        found += sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
        files |= {str(file.relative_to(folder)): file for file in found}
    settings = [folder / GENERATION_FILE for folder in (*folders, *own) if (folder / GENERATION_FILE).is_file()]
    if settings:
        files[GENERATION_FILE] = settings[0]
    return files


def save_tokenizer(tokenizer: HuggingFaceTokenizer, folder: str | Path) -> None:
    """Write a tokenizer over the one in `folder`, and remove the files that would contradict it."""
    for name in ("added_tokens.json", "chat_template.jinja"):
        (Path(folder) / name).unlink(missing_ok=True)
    tokenizer.save(folder)


def check_rows(folder: str | Path, rows: int) -> None:
    """Check that every id of the tokenizer in `folder` has its row in the vocabulary matrices.

    Raises:
        CheckpointError: there are fewer rows than ids, or the tokenizer cannot be read.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return
    try:
        largest = max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values())
    except Exception as error:  # the library raises plain Exception
        refuse_lfs_pointer(file)
        raise CheckpointError(f"{file} is damaged ({error}): copy or download it again") from error
    if largest >= rows:
        raise CheckpointError(
            f"{file} has ids up to {largest}, but the vocabulary matrices have {rows} rows: tokenizer and weights do "
            "not belong together"
        )


def tag_ids(folder: str | Path) -> dict[str, int]:
    """Ids of the structure tags by the tokenizer.json in `folder`; empty unless it has all of them."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return {}
    added = {token["content"]: token["id"] for token in read_json_object(file).get("added_tokens", [])}
    return {tag: added[tag] for tag in TAGS} if set(TAGS) <= added.keys() else {}


def check_tags(folder: str | Path, ids: Mapping[str, int]) -> None:
    """Open the tokenizer in `folder` as its users do, by AutoTokenizer: each tag must be one token, of its id.

    Some classes of transformers build the tokenizer from other files than the `tokenizers` library reads.

    Raises:
        CheckpointError: transformers cannot open it, or cuts a tag into pieces.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        found = {tag: tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in ids}
    except Exception as error:  # whatever the class of the tokenizer raises
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot open the tokenizer in {folder}: {error}"
        ) from error
    wrong = [tag for tag, number in ids.items() if found[tag][-1:] != [number]]
    if wrong:
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} reads {wrong[0]} as tokens {found[wrong[0]]}, not as "
            f"token {ids[wrong[0]]} ({len(wrong)} of {len(ids)} tags are wrong): tokenizer.json and "
            "tokenizer_config.json contradict each other; convert with --add-control-tokens, which writes both"
        )


def class_that_reads_otherwise(folder: str | Path) -> str | None:
    """The class that AutoTokenizer makes of the tokenizer in `folder`, if it gives other ids than tokenizer.json.

    Beside the config.json of some architectures transformers 5 takes their own class whatever the files say, and such a
    class cuts text in its own way (findings/transformers_5_qwen2_config_replaces_own_tokenizer.sh).

    Returns:
        The name of the class; None if it reads a sample of text as tokenizer.json does, if there is no tokenizer.json,
        or if it cannot be opened, which `check_tags` reports.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        own, opened = Tokenizer.from_file(str(file)), AutoTokenizer.from_pretrained(str(folder))
        own.no_truncation()
        own.no_padding()
        found = opened(_SAMPLE, add_special_tokens=False)["input_ids"]
    except Exception:  # whatever the class of the tokenizer raises
        return None
    return None if found == own.encode(_SAMPLE, add_special_tokens=False).ids else type(opened).__name__


def write_generation_config(folder: str | Path) -> None:
    """Write generation_config.json from the tokenizer in `folder`, unless there is one or the tokenizer is missing.

    Without it servers do not know where an answer ends.
    """
    path = Path(folder) / GENERATION_FILE
    if path.is_file() or not (Path(folder) / "tokenizer.json").is_file():
        return
    try:
        tokenizer = HuggingFaceTokenizer(folder)
    except ConfigError as error:  # a vocabulary that cannot have the tags is no reason to fail here
        logger.warning("no %s is written: %s", GENERATION_FILE, error)
        return
    if tokenizer.eod is not None:
        values = {"eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad, "do_sample": False}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_model_card(
    folder: str | Path, name: str, config: ModelConfig, architecture: str, provenance: Mapping[str, Any]
) -> None:
    """Write README.md: what the model is, how to use it, where it comes from.

    Its example opens the tokenizer with the class that reads it as tokenizer.json says; a warning says so where this is
    not AutoTokenizer.

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
        structure=_TAGGED.format(architecture=architecture) if tag_ids(folder) else _UNTAGGED,
        opener=_opener(folder, name),
    )  # fmt: skip
    (Path(folder) / CARD_FILE).write_text(text, encoding="utf-8")


def _opener(folder: str | Path, name: str) -> str:
    """The class of transformers whose from_pretrained reads the tokenizer in `folder` as its tokenizer.json says."""
    found = class_that_reads_otherwise(folder)
    if found is None:
        return "AutoTokenizer"
    logger.warning(
        "%s: AutoTokenizer makes a %s of its tokenizer, which cuts text otherwise than tokenizer.json says: open it by "
        "PreTrainedTokenizerFast.from_pretrained, as its README.md does, and give servers that use AutoTokenizer token "
        "ids instead of text",
        name, found,
    )  # fmt: skip
    return "PreTrainedTokenizerFast"


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
from transformers import AutoModelForCausalLM, {opener}

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = {opener}.from_pretrained("FOLDER")
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
