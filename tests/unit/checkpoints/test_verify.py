"""verify end to end: what was converted is equal in every format, and each kind of fault is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_multiverse.checkpoints.convert import convert_checkpoint
from megatron_multiverse.checkpoints.convert_config import ConvertConfig
from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.reference_logits import fixed_inputs, relative_error, transformers_logits
from megatron_multiverse.checkpoints.sources import open_checkpoint
from megatron_multiverse.checkpoints.verify import (
    VerifyOptions,
    compare_logits,
    parse_parallel_size,
    verify_checkpoints,
)
from megatron_multiverse.checksums import CHECKSUMS_FILE
from megatron_multiverse.errors import CheckpointError, ConfigError
from megatron_multiverse.model.weights import save_model, weight_state
from megatron_multiverse.structure import TAGS
from tests.forked import run_forked
from tests.in_process import Done, run_here
from tests.unit.checkpoints.hf_folders import save_hf_model, save_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every format; the vocabulary is padded for tensor parallelism where the format does so."""
    root = tmp_path_factory.mktemp("formats")
    hf = root / "hf"
    save_hf_model(hf, "qwen3", vocab_size=301, head_dim=16, tie_word_embeddings=False, max_shard_size="40KB")
    save_tokenizer(hf)
    made = {"hf": hf}
    cut = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "make_vocab_size_divisible_by": 8}
    options = {"torch_dist": cut, "legacy": cut | {"ckpt_format": "torch"}}
    for name, more in options.items():
        convert_checkpoint(ConvertConfig(from_="hf", to="mcore", load=str(hf), save=str(root / name), **more))
        made[name] = root / name
    convert_checkpoint(ConvertConfig(from_="mcore", to="hf", load=str(root / "torch_dist"), save=str(root / "back")))
    model, config = load_checkpoint(hf)
    save_model(model, config, root / "model")
    return made | {"back": root / "back", "model": root / "model"}


def difference(first: Path, second: Path, **options: object) -> dict[str, object]:
    return verify_checkpoints(
        VerifyOptions(first=first, second=second, **{"parallel_sizes": ["1x1"], "no_logits": True, **options})
    )


@pytest.mark.parametrize("name", ["torch_dist", "legacy", "back", "model"])
def test_tensors_of_every_format_are_bit_equal(folders: dict[str, Path], name: str) -> None:
    result = difference(folders["hf"], folders[name])
    assert result["equal"] and result["tensors_compared"] == 25 and result["logits"] == []
    assert difference(folders[name], folders["hf"])["equal"]


def test_logits_of_a_cut_checkpoint_at_all_parallel_sizes(folders: dict[str, Path]) -> None:
    sizes = ["1x1", "2x1", "1x2", "2x2", "4x1", "3x1"]
    result = verify_checkpoints(VerifyOptions(first=folders["hf"], second=folders["torch_dist"], parallel_sizes=sizes))
    rows = {(row["parallel_size"], row["mask"]): row for row in result["logits"]}
    assert result["equal"] and len(rows) == 11
    assert "num_attention_heads (4)" in rows.pop(("3x1", "all"))["skipped"]
    assert all(row["relative_error"] < 1e-5 and row["reference"] == "transformers" for row in rows.values())


def test_the_reference_is_transformers_whichever_side_it_can_open(folders: dict[str, Path]) -> None:
    pairs = {("legacy", "hf"): "transformers", ("legacy", "model"): "1x1"}
    for (first, second), reference in pairs.items():
        result = verify_checkpoints(VerifyOptions(first=folders[first], second=folders[second], parallel_sizes=["1x1"]))
        assert result["equal"] and {row["reference"] for row in result["logits"]} == {reference}


@pytest.mark.parametrize("name", ["hf", "torch_dist", "legacy", "model"])
def test_any_format_loads_into_the_same_model(folders: dict[str, Path], name: str) -> None:
    want, _ = load_checkpoint(folders["hf"])
    got, config = load_checkpoint(folders[name])
    assert config == open_checkpoint(folders["hf"]).config
    for tensor_name, tensor in weight_state(want).items():
        assert torch.equal(weight_state(got)[tensor_name], tensor), tensor_name


def test_added_tags_and_dtype_are_expected_when_said(folders: dict[str, Path], tmp_path: Path) -> None:
    tagged = tmp_path / "tagged"
    convert_checkpoint(
        ConvertConfig(
            from_="hf", to="mcore", load=str(folders["hf"]), save=str(tagged), add_control_tokens=True, dtype="bf16"
        )
    )
    how = {"add_control_tokens": True, "dtype": "bf16"}
    assert difference(folders["hf"], tagged, **how)["equal"]
    assert not difference(folders["hf"], tagged, add_control_tokens=True)["equal"]
    without = difference(folders["hf"], tagged, dtype="bf16")
    assert [row["tensor"] for row in without["tensor_differences"]] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert without["tensor_differences"][0]["first_row"] == 259  # after the tokenizer's 259 tokens
    logits = verify_checkpoints(VerifyOptions(first=folders["hf"], second=tagged, parallel_sizes=["1x1"], **how))
    assert logits["equal"]
    convert_checkpoint(ConvertConfig(from_="mcore", to="hf", load=str(tagged), save=str(tmp_path / "back")))
    assert difference(tagged, tmp_path / "back")["equal"]
    tokens = {t["content"] for t in json.loads((tmp_path / "back/tokenizer.json").read_text())["added_tokens"]}
    assert set(TAGS) <= tokens and "as special tokens" in (tmp_path / "back/README.md").read_text()


def test_one_changed_bit_one_shape_and_one_norm_are_seen(folders: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folders["model"], changed)
    tensors = load_file(changed / "model.safetensors")
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    tensors[name].view(torch.int32)[40, 3] ^= 1
    tensors["decoder.final_layernorm.weight"][0] = 0.0
    save_file(tensors, changed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*it was written with"):
        difference(folders["hf"], changed)
    (changed / CHECKSUMS_FILE).unlink()  # changed on purpose
    result = difference(folders["hf"], changed)
    assert [row["tensor"] for row in result["tensor_differences"]] == [
        "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"
    ]  # fmt: skip
    assert result["tensor_differences"][0]["reason"] == "1 of 1024 values differ"
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rotary_base": 123.0}))
    assert difference(folders["hf"], changed)["config_differences"] == {"rotary_base": [10000.0, 123.0]}


def test_equal_weights_with_different_logits_are_seen(folders: dict[str, Path], tmp_path: Path) -> None:
    """A converter that gets the rotary base wrong: all tensors equal, all logits not."""
    wrong = tmp_path / "wrong"
    shutil.copytree(folders["model"], wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"rotary_base": 1e6}))
    options = VerifyOptions(first=folders["hf"], second=wrong)
    rows = compare_logits(open_checkpoint(options.first), open_checkpoint(wrong), [(1, 1)], options, set())
    assert not any(row["equal"] for row in rows)


@pytest.mark.parametrize(("field", "value"), [("rotary_base", 10100.0), ("layernorm_epsilon", 2e-5)])
def test_a_small_fault_is_not_lost_in_the_tolerance(
    folders: dict[str, Path], tmp_path: Path, field: str, value: float
) -> None:
    """Such faults move the logits by less than one in a thousand; what is allowed follows from the model's noise."""
    wrong = tmp_path / "wrong"
    shutil.copytree(folders["model"], wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {field: value}))
    options = VerifyOptions(first=folders["hf"], second=wrong)
    rows = compare_logits(open_checkpoint(options.first), open_checkpoint(wrong), [(1, 1)], options, set())
    assert not any(row["equal"] for row in rows)
    assert all(row["noise"] < row["tolerance"] < row["relative_error"] < 0.05 for row in rows)


def test_a_noisy_model_is_allowed_its_noise(tmp_path: Path) -> None:
    """Attention so sharp that rounding in float32 alone moves the logits: no fault of a converter."""
    model = save_hf_model(tmp_path / "quiet", "llama", num_hidden_layers=6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 10.0 if "q_proj" in name or "k_proj" in name else 1.0
    model.save_pretrained(tmp_path / "noisy")
    noise = {}
    for name in ("quiet", "noisy"):
        convert_checkpoint(
            ConvertConfig(from_="hf", to="mcore", load=str(tmp_path / name), save=str(tmp_path / f"{name}-mcore"))
        )
        pair = {"first": tmp_path / name, "second": tmp_path / f"{name}-mcore", "parallel_sizes": ["1x1", "2x1"]}
        assert verify_checkpoints(VerifyOptions(**pair))["equal"]
        _, noise[name] = transformers_logits(tmp_path / name, fixed_inputs(range(320)))
    assert noise["noisy"] > 10 * noise["quiet"]


def test_what_transformers_refuses_is_one_error(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["hf"], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"initializer_range": "wide"}))
    with pytest.raises(CheckpointError, match=r"transformers \S+ cannot open .*broken"):
        transformers_logits(broken, fixed_inputs(range(301)))


def test_options_without_effect_are_refused(folders: dict[str, Path]) -> None:
    pair = {"first": folders["hf"], "second": folders["back"]}
    for options, message in [
        ({"tag_rows": "mean"}, "no effect without --add-control-tokens"),
        ({"tokenizer_model": "x"}, "no effect without --add-control-tokens"),
        ({"no_logits": True, "tolerance": 0.1}, "--tolerance has no effect with --no-logits"),
    ]:
        with pytest.raises(ConfigError, match=message):
            VerifyOptions(**pair, **options)


def test_the_tool_reports_and_its_exit_code_tells(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = "tools/verify_checkpoint.py"

    def run(*words: str | Path) -> Done:
        return run_here(monkeypatch, capsys, tool, *words)

    report = tmp_path / "report.json"
    good = run(folders["hf"], folders["back"], "--no-logits", "--report", report)
    assert good.returncode == 0 and "EQUAL" in good.stdout and json.loads(report.read_text())["equal"]
    other = tmp_path / "other"
    save_hf_model(other, "qwen3", seed=9, vocab_size=301, head_dim=16, tie_word_embeddings=False)
    bad = run(folders["hf"], other, "--no-logits")
    assert bad.returncode == 1 and "DIFFERENT model.embed_tokens.weight" in bad.stdout
    missing = run_forked(ROOT / tool, folders["hf"], tmp_path / "nowhere")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr


def test_impossible_options_are_refused(folders: dict[str, Path]) -> None:
    assert parse_parallel_size("2x4") == (2, 4)
    with pytest.raises(ConfigError, match="'2-1' must be"):
        parse_parallel_size("2-1")
    with pytest.raises(CheckpointError, match="none of the parallel sizes"):
        verify_checkpoints(VerifyOptions(first=folders["hf"], second=folders["back"], parallel_sizes=["3x1"]))
    assert relative_error(torch.ones(2), torch.tensor([1.0, torch.nan])) == float("inf")
