from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_multiverse.checkpoints.control_tokens import ControlTokenSource
from megatron_multiverse.checkpoints.formats.hf import HFSource
from megatron_multiverse.checkpoints.formats.hf_assets import (
    copy_assets,
    save_tokenizer,
    write_generation_config,
    write_model_card,
)
from megatron_multiverse.checkpoints.formats.hf_config import hf_config_to_model_config, read_hf_config
from tests.unit.checkpoints import hf_folders


def test_assets_travel_and_are_completed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    hf_folders.save_hf_model(source)
    hf_folders.save_tokenizer(source)
    (source / "generation_config.json").unlink()
    (source / "vocab.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("{{ 1 }}")
    further = "additional_chat_templates/tools.jinja"
    assert copy_assets(source, [source], target) == ["tokenizer.json", "tokenizer_config.json", "vocab.json", further]
    assert (target / further).read_text() == "{{ 1 }}"
    shutil.rmtree(target / "additional_chat_templates")
    write_generation_config(target)
    assert json.loads((target / "generation_config.json").read_text()) == {
        "eos_token_id": 257, "pad_token_id": 258, "do_sample": False
    }  # fmt: skip
    save_tokenizer(ControlTokenSource(HFSource(source)).tokenizer, target)
    names = sorted(path.name for path in target.iterdir())
    assert names == ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == hf_folders.CHAT_TEMPLATE


def test_settings_are_the_models_and_tokenizers_may_come_from_elsewhere(tmp_path: Path) -> None:
    model, tokenizer, target = tmp_path / "model", tmp_path / "tokenizer", tmp_path / "target"
    hf_folders.save_tokenizer(tokenizer)
    model.mkdir()
    target.mkdir()
    for folder, temperature in ((model, 0.7), (tokenizer, 0.1)):
        (folder / "generation_config.json").write_text(json.dumps({"temperature": temperature}))
    copy_assets(tokenizer, [tmp_path / "none", model], target)
    assert json.loads((target / "generation_config.json").read_text()) == {"temperature": 0.7}
    assert (target / "tokenizer.json").is_file()


def test_the_models_own_generation_config_is_kept(tmp_path: Path) -> None:
    hf_folders.save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    write_generation_config(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"temperature": 0.7}


def test_the_card_tells_origin_and_tags(tmp_path: Path) -> None:
    hf_folders.save_hf_model(tmp_path)
    hf_folders.save_tokenizer(tmp_path)
    config = hf_config_to_model_config(read_hf_config(tmp_path))
    origin = {"source": "a|b", "iteration": 12, "absent": None}
    write_model_card(tmp_path, "Small", config, "Qwen2ForCausalLM", origin)
    plain = (tmp_path / "README.md").read_text()
    assert "| source | a\\|b |" in plain and "| iteration | 12 |" in plain and "absent" not in plain
    assert f"| parameters | {config.num_parameters:,} |" in plain and "has no structure tags" in plain
    save_tokenizer(ControlTokenSource(HFSource(tmp_path)).tokenizer, tmp_path)
    write_model_card(tmp_path, "Small", config, "Qwen2ForCausalLM", origin)
    assert "as special tokens" in (tmp_path / "README.md").read_text()
