"""What is exported is opened as its users do: with the transformers that is installed, whichever version that is.

`make test-transformers TRANSFORMERS=4.57.1` runs these tests with another one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.formats.hf_assets import class_that_reads_otherwise
from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.verify import VerifyOptions, verify_checkpoints
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer
from megatron_multiverse.errors import CheckpointError
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.structure import TAGS
from tests.unit.checkpoints.hf_folders import save_hf_model, save_published_tokenizer

FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16},
    "llama": {"tie_word_embeddings": False},
}
SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [262, 260]}
TEXTS = [
    "The thing is <Goal>\n<Outline>\n1: the inner</Outline>\n</Goal>", "<Think>\na\n\nb</Think><|im_end|> caf\u00e9",
    "<Path>\n1: x\n</Path>\n<Conclusion>\ny\n</Conclusion>\n</Parallel>",
]  # fmt: skip
CHAT = [{"role": "user", "content": "Why the <Goal>?"}]


def convert(load: Path, save: Path, from_: str, to: str, **options: Any) -> Path:
    convert_checkpoint(ConvertConfig(from_=from_, to=to, load=str(load), save=str(save), **options))
    return save


def published(folder: Path, model_type: str, **changes: Any) -> Path:
    save_hf_model(folder, model_type, **{**FAMILIES[model_type], **changes})
    save_published_tokenizer(folder, model_type)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published model, with tags through megatron-core's format, with tags directly, and without tags."""
    root = tmp_path_factory.mktemp(request.param)
    plain = published(root / "plain", request.param)
    mcore = convert(plain, root / "mcore", "hf", "mcore", add_control_tokens=True, tensor_model_parallel_size=2)
    return {
        "plain": plain,
        "mcore": mcore,
        "tagged": convert(mcore, root / "tagged", "mcore", "hf"),
        "direct": convert(plain, root / "direct", "hf", "hf", add_control_tokens=True),
        "untagged": convert(plain, root / "untagged", "hf", "hf"),
    }


@pytest.mark.parametrize("name", ["tagged", "direct"])
def test_every_tag_is_one_token_of_the_recorded_id(folders: dict[str, Path], name: str) -> None:
    recorded = json.loads((folders["mcore"] / "conversion.json").read_text())["control_tokens"]["tag_ids"]
    before, after = AutoTokenizer.from_pretrained(folders["plain"]), AutoTokenizer.from_pretrained(folders[name])
    assert list(recorded) == list(TAGS) and min(recorded.values()) == len(before)
    assert {tag: after(tag, add_special_tokens=False)["input_ids"] for tag in TAGS} == {
        tag: [number] for tag, number in recorded.items()
    }
    assert len(after) == len(before) + len(TAGS)
    ours = HuggingFaceTokenizer(folders[name])
    for text in TEXTS:
        ids = after(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.tokenize(text) and after.decode(ids) == text


@pytest.mark.parametrize("name", ["tagged", "direct", "untagged"])
def test_template_and_generation_settings_are_unchanged(folders: dict[str, Path], name: str) -> None:
    before, after = AutoTokenizer.from_pretrained(folders["plain"]), AutoTokenizer.from_pretrained(folders[name])
    for prompt in (True, False):
        how = {"tokenize": False, "add_generation_prompt": prompt}
        assert after.apply_chat_template(CHAT, **how) == before.apply_chat_template(CHAT, **how)
    assert (after.bos_token, after.eos_token, after.pad_token) == (before.bos_token, before.eos_token, before.pad_token)
    assert after("the Go")["input_ids"] == before("the Go")["input_ids"]  # with a begin token where there was one
    old = [token for token in before.added_tokens_encoder if token not in TAGS]
    assert [after(token, add_special_tokens=False)["input_ids"] for token in old] == [
        before(token, add_special_tokens=False)["input_ids"] for token in old
    ]
    assert set(before.all_special_tokens) <= {
        str(token) for token in after.added_tokens_decoder.values() if token.special
    }
    settings = [GenerationConfig.from_pretrained(folders[key]).to_dict() for key in ("plain", name)]
    assert settings[0] == settings[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["tagged", "direct", "untagged"])
def test_the_model_gives_the_same_logits(folders: dict[str, Path], name: str) -> None:
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    first, second = (AutoModelForCausalLM.from_pretrained(folders[key], dtype=torch.float32) for key in ("plain", name))
    rows = len(AutoTokenizer.from_pretrained(folders["plain"]))
    assert torch.equal(first(ids).logits[..., :rows], second(ids).logits[..., :rows])


def test_the_proof_opens_tokenizers_too(folders: dict[str, Path]) -> None:
    options = {"parallel_sizes": ["1x1"], "add_control_tokens": True}
    result = verify_checkpoints(VerifyOptions(first=folders["plain"], second=folders["tagged"], **options))
    assert result["equal"] and [row["folder"] for row in result["tokenizers"]] == [str(folders["tagged"])]


def test_files_that_contradict_each_other_are_not_exported(tmp_path: Path) -> None:
    """Where a table of added tokens lacks the tags, some classes of transformers do not look into tokenizer.json."""
    plain = published(tmp_path / "plain", "qwen3")
    broken = convert(plain, tmp_path / "broken", "hf", "hf", add_control_tokens=True)
    (broken / "tokenizer_config.json").write_text((plain / "tokenizer_config.json").read_text())
    whole = len(AutoTokenizer.from_pretrained(broken)) == len(AutoTokenizer.from_pretrained(plain)) + len(TAGS)
    result = verify_checkpoints(VerifyOptions(first=plain, second=broken, no_logits=True, add_control_tokens=True))
    assert result["equal"] == result["tokenizers"][0]["equal"] == whole
    if not whole:  # transformers 5; transformers 4 reads tokenizer.json first
        assert "not as token" in result["tokenizers"][0]["problem"]
        with pytest.raises(CheckpointError, match="contradict each other"):
            convert(broken, tmp_path / "again", "hf", "hf")
        assert not (tmp_path / "again").exists()
    mended = convert(broken, tmp_path / "mended", "hf", "hf", add_control_tokens=True)
    assert len(AutoTokenizer.from_pretrained(mended)) == len(AutoTokenizer.from_pretrained(plain)) + len(TAGS)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_tokenizer_that_auto_tokenizer_reads_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str
) -> None:
    """transformers 5 makes a Qwen2Tokenizer of any beside a Qwen2: the export warns, and its card opens it rightly."""
    plain = published(tmp_path / "plain", model_type)
    (plain / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    content = json.loads((plain / "tokenizer.json").read_text())
    letters = {"type": "Split", "pattern": {"Regex": "\\p{L}"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"]["pretokenizers"][0] = letters
    (plain / "tokenizer.json").write_text(json.dumps(content))
    export = convert(plain, tmp_path / "export", "hf", "hf", add_control_tokens=True)

    ids = HuggingFaceTokenizer(export).tokenize(TEXTS[0])
    differs = AutoTokenizer.from_pretrained(export)(TEXTS[0], add_special_tokens=False)["input_ids"] != ids
    assert differs == (model_type == "qwen2" and int(transformers.__version__.split(".")[0]) >= 5)
    opener = "PreTrainedTokenizerFast" if differs else "AutoTokenizer"
    assert f'tokenizer = {opener}.from_pretrained("FOLDER")' in (export / "README.md").read_text()
    opened = getattr(transformers, opener).from_pretrained(export)
    assert opened(TEXTS[0], add_special_tokens=False)["input_ids"] == ids
    warned = "AutoTokenizer makes a Qwen2Tokenizer of its tokenizer, which cuts text otherwise" in caplog.text
    assert warned == differs


def test_published_tokenizers_are_not_warned_of(folders: dict[str, Path]) -> None:
    assert [class_that_reads_otherwise(folder) for folder in folders.values()] == [None] * len(folders)
    for name in ("tagged", "direct", "untagged"):
        assert 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")' in (folders[name] / "README.md").read_text()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tokenizers_that_transformers_saved_itself(tmp_path: Path, model_type: str) -> None:
    """Its newer releases leave out the table of added tokens, and use names that older ones do not understand."""
    published(tmp_path / "hf", model_type)
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "hf")
    tagged = convert(tmp_path / "hf", tmp_path / "tagged", "hf", "hf", add_control_tokens=True)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", tagged))
    assert len(after) == len(before) + len(TAGS)
    assert after.apply_chat_template(CHAT, tokenize=False) == before.apply_chat_template(CHAT, tokenize=False)
    written = json.loads((tagged / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] != "TokenizersBackend"
    assert not isinstance(written.get("extra_special_tokens"), list)


SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@torch.no_grad()
def test_rotary_settings_written_by_transformers_5_reach_every_version(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters alone, which transformers 4 does not read: it would take base 10,000."""
    published(tmp_path / "hf", "llama", max_position_embeddings=16384)
    file = tmp_path / "hf/config.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("rope_")}
    file.write_text(json.dumps({**values, "rope_parameters": {**SCALING, "rope_theta": 5e5}}))
    back = convert(convert(tmp_path / "hf", tmp_path / "mcore", "hf", "mcore"), tmp_path / "back", "mcore", "hf")
    written = json.loads((back / "config.json").read_text())
    assert written["rope_theta"] == 5e5 and written["rope_scaling"] == SCALING
    assert {**written["rope_parameters"]} == {**SCALING, "rope_theta": 5e5}
    ids = torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    ours, _ = load_checkpoint(back)
    want = ours.eval()(ids, torch.arange(400)[None], None, packed_seq_params=LayoutParams.causal(ids))
    theirs = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert AutoConfig.from_pretrained(back).vocab_size == 320
