"""Damaged or unsuitable input: a clear error with file and tensor, and nothing under the target's name."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.checkpoints.sources import check_source, open_checkpoint
from megatron_multiverse.checkpoints.verify import VerifyOptions, verify_checkpoints
from megatron_multiverse.checksums import check_files
from megatron_multiverse.errors import CheckpointError, ConfigError
from tests.unit.checkpoints.hf_folders import save_tokenizer
from tests.unit.checkpoints.test_convert import assert_same, hf_folder, run


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return hf_folder(tmp_path / "hf")


def refused(folder: Path, match: str, error: type[Exception] = CheckpointError, **options: object) -> None:
    target = folder.parent / "out"
    with pytest.raises(error, match=match):
        run(folder, target, **options)
    assert not target.exists()


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """Replace (or remove) a tensor in its file; returns the file."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
            save_file(tensors, file)
            return file
    raise AssertionError(name)


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def test_missing_shard(hf: Path) -> None:
    file = sorted(hf.glob("*.safetensors"))[2]
    name = next(iter(load_file(file)))
    file.unlink()
    refused(hf, rf"{file.name} is missing.*{name.rsplit('.', 2)[0]}")


def test_truncated_shard(hf: Path) -> None:
    file = sorted(hf.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])
    refused(hf, rf"{file.name}: tensor \S+ should end at byte \d+, the file has \d+; it is truncated")
    file.write_bytes(file.read_bytes()[:40])
    refused(hf, rf"{file.name}: no complete safetensors header")


def test_wrong_shape(hf: Path) -> None:
    file = change(hf, "model.layers.1.mlp.up_proj.weight", torch.zeros(47, 36))
    refused(hf, rf"{file.name}: tensor model.layers.1.mlp.up_proj.weight has shape \[47, 36\].*asks for \[48, 36\]")


def test_missing_and_extra_tensor(hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    change(hf, "model.norm.weight", None)
    refused(hf, "names model.norm.weight in model-.*does not hold it")
    values = json.loads(index.read_text())
    del values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    refused(hf, r"has no tensor model\.norm\.weight in any of its \d+ files")


def test_extra_tensor(hf: Path) -> None:
    first = sorted(hf.glob("*.safetensors"))[0]
    save_file({**load_file(first), "model.layers.0.mlp.gate.weight": torch.zeros(3)}, first)
    refused(hf, rf"{first.name}: tensor model.layers.0.mlp.gate.weight is not part of a dense qwen2 model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values(hf: Path, value: float, dtype: torch.dtype) -> None:
    for file in hf.glob("*.safetensors"):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file)
    bad = torch.ones(36, 48, dtype=dtype)
    bad[20, 30] = value
    file = change(hf, "model.layers.1.mlp.down_proj.weight", bad)
    refused(hf, rf"{file.name}: tensor model.layers.1.mlp.down_proj.weight holds NaN or infinite")
    run(hf, hf.parent / "allowed", allow_non_finite=True)
    run(hf.parent / "allowed", hf.parent / "back", "mcore", "hf", allow_non_finite=True)
    assert (hf.parent / "back/config.json").is_file()


def test_large_finite_values_are_no_damage(hf: Path) -> None:
    change(hf, "model.layers.1.mlp.down_proj.weight", torch.full((36, 48), 3e38))
    run(hf, hf.parent / "out")


def test_a_value_beyond_the_range_of_the_dtype_is_refused(hf: Path) -> None:
    values = torch.full((36, 48), 1.0)
    values[1, 2] = -1e5
    change(hf, "model.layers.1.mlp.down_proj.weight", values)
    with pytest.raises(CheckpointError, match=r"down_proj.weight has values of 1e\+05, float16 ends at 6.55e\+04"):
        run(hf, hf.parent / "half", dtype="float16")
    run(hf, hf.parent / "bf16", dtype="bf16")
    run(hf, hf.parent / "allowed", dtype="float16", allow_non_finite=True)


def test_a_tied_embedding_with_another_head_is_refused(tmp_path: Path) -> None:
    """transformers would use the head of the file; a copy of the embedding is dropped."""
    folder = hf_folder(tmp_path / "hf", tied=True)
    file = sorted(folder.glob("*.safetensors"))[0]
    embedding = load_file(file)["model.embed_tokens.weight"]
    for head, equal in ((embedding.clone(), True), (embedding.flip(0).contiguous(), False), (embedding[:40], False)):
        save_file({**load_file(file), "lm_head.weight": head}, file)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = file.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if equal:
            run(folder, tmp_path / "kept")
            run(tmp_path / "kept", tmp_path / "back", "mcore", "hf")
            assert "lm_head.weight" not in load_file(tmp_path / "back/model.safetensors")
        else:
            refused(folder, rf"{file.name}: lm_head.weight differs from the embedding.*tie_word_embeddings")


def test_a_tied_embedding_with_another_output_layer_is_refused(tmp_path: Path) -> None:
    """The same fault in Megatron's older format, where the last pipeline stage has a copy of its own."""
    folder, mcore = hf_folder(tmp_path / "hf", tied=True), tmp_path / "mcore"
    run(folder, mcore, ckpt_format="torch", pipeline_model_parallel_size=2)
    file = mcore / "release/mp_rank_00_001/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["output_layer.weight"][3, 5] += 1
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_001.*output_layer.weight differs from the embedding"):
        run(mcore, tmp_path / "back", "mcore", "hf")


def test_ranks_that_disagree_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, mcore = hf_folder(tmp_path / "hf"), tmp_path / "mcore"
    run(folder, mcore, ckpt_format="torch", tensor_model_parallel_size=3)
    run(mcore, tmp_path / "quiet", "mcore", "hf")
    assert "differs" not in caplog.text
    file = mcore / "release/mp_rank_01/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"][0] += 1
    torch.save(content, file)
    run(mcore, tmp_path / "back", "mcore", "hf")
    assert "mp_rank_01" in caplog.text and "decoder.final_layernorm.weight differs from the one of" in caplog.text
    assert_same(folder, tmp_path / "back")


@torch.no_grad()
def test_the_files_that_transformers_reads_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A single file comes before an index, whether the index is whole or left behind by an earlier save."""
    new, both = hf_folder(tmp_path / "new"), hf_folder(tmp_path / "both")
    model = AutoModelForCausalLM.from_pretrained(new)
    for weight in model.parameters():
        weight += 0.5
    model.save_pretrained(new)  # removes the old shards, not their index
    assert (new / "model.safetensors.index.json").is_file()
    shutil.copy(new / "model.safetensors", both)
    for name in ("new", "both"):
        run(tmp_path / name, tmp_path / f"{name}-mcore")
        run(tmp_path / f"{name}-mcore", tmp_path / f"{name}-back", "mcore", "hf")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for key, tensor in load_file(tmp_path / f"{name}-back/model.safetensors").items():
            assert torch.equal(tensor, loaded[key]), key
        assert f"{tmp_path / name}: taking model.safetensors, as transformers does, not" in caplog.text


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model-00001-of-00002.bin", "pickled weights"),
        ("model.fp16.safetensors", "a variant"),
        ("model-00001-of-00002.safetensors", "shards whose index is missing"),
        ("consolidated.00.pth", "the layout of the model's authors"),
        ("model-Q4_K_M.gguf", "GGUF weights"),
    ],
)
def test_weights_of_other_layouts_are_named_with_a_way_out(hf: Path, file: str, said: str) -> None:
    for path in (*hf.glob("*.safetensors"), hf / "model.safetensors.index.json"):
        path.unlink()
    refused(hf, r"has neither model\.safetensors nor model\.safetensors\.index\.json: a folder")
    (hf / file).write_bytes(b"x")
    refused(hf, rf"but {re.escape(file)}: {said}")


def test_an_adapter_beside_the_weights_is_not_ignored(hf: Path) -> None:
    (hf / "adapter_config.json").write_text("{}")
    refused(hf, "adapter_config.json: with peft installed.*merge_and_unload")


def test_tensors_that_are_no_weights_are_called_so(hf: Path) -> None:
    file = sorted(hf.glob("*.safetensors"))[0]
    before = load_file(file)
    save_file({**before, "model.position_ids": torch.arange(4)}, file)
    refused(hf, "model.position_ids has dtype I64.*it is no weight, take it out")
    save_file({**before, "model.layers.0.mlp.up_proj.weight_packed": torch.zeros(4, dtype=torch.uint8)}, file)
    refused(hf, "weight_packed has dtype U8.*a quantised weight")


def test_mixed_dtypes_convert_once_one_is_chosen(hf: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    file = next(f for f in sorted(hf.glob("*.safetensors")) if name in load_file(f))
    change(hf, name, load_file(file)[name].bfloat16())
    refused(hf, "become one tensor, but have different dtypes: choose one for all tensors with --dtype")
    run(hf, hf.parent / "mcore", dtype="bf16")
    run(hf.parent / "mcore", hf.parent / "back", "mcore", "hf")
    assert load_file(hf.parent / "back/model.safetensors")[name].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "header",
    [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": 4}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'],
)  # fmt: skip
def test_damaged_headers_are_one_error(hf: Path, header: bytes) -> None:
    file = sorted(hf.glob("*.safetensors"))[0]
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    refused(hf, rf"{file.name}: ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "first shard"])
def test_git_lfs_pointers_are_called_so(hf: Path, name: str) -> None:
    save_tokenizer(hf)
    file = sorted(hf.glob("*.safetensors"))[0] if name == "first shard" else hf / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")
    refused(hf, rf"{file.name} is a git-lfs pointer.*git lfs pull")


def test_folders_and_files_that_cannot_be_used(hf: Path) -> None:
    (hf.parent / "file").write_text("x")
    for save, message in [(hf.parent / "file", "already exists"), (hf.parent / "file/out", "file")]:
        with pytest.raises(CheckpointError, match=message):
            run(hf, save)
    with pytest.raises(CheckpointError, match="is no folder"):
        run(hf.parent / "file", hf.parent / "out")


def test_wrong_family_and_unsupported_architectures(hf: Path) -> None:
    for family in ("llama", "gpt2"):
        refused(hf, f"holds a qwen2 model, --family says {family}", ConfigError, family=family)
    for changes, message in [
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"num_experts": 8}, r"num_experts \(8\)"),
        ({"use_sliding_window": True, "sliding_window": 128}, r"use_sliding_window \(128\)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope scaling 'yarn'"),
        ({"hidden_act": "gelu"}, r"hidden_act \('gelu'\)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "not supported"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ]:
        before = (hf / "config.json").read_text()
        edit_config(hf, **changes)
        refused(hf, message, ConfigError)
        (hf / "config.json").write_text(before)


def test_sizes_that_do_not_divide(hf: Path) -> None:
    refused(hf, r"num_query_groups \(3\) is neither a multiple nor", ConfigError, tensor_model_parallel_size=2)
    refused(hf, r"num_attention_heads \(6\) is not divisible", ConfigError, tensor_model_parallel_size=4)
    refused(hf, r"num_layers \(2\) is not divisible", ConfigError, pipeline_model_parallel_size=3)


def test_existing_target_is_left_alone(hf: Path) -> None:
    (hf.parent / "out").mkdir()
    (hf.parent / "out/mine").write_text("x")
    with pytest.raises(CheckpointError, match="already exists"):
        run(hf, hf.parent / "out")
    assert [p.name for p in (hf.parent / "out").iterdir()] == ["mine"]


def test_damaged_torch_dist(hf: Path) -> None:
    mcore, out = hf.parent / "mcore", hf.parent / "back"
    run(hf, mcore, shard_size=20e-6)
    file = mcore / "release/__0_1.distcp"
    whole = file.read_bytes()
    for damage, message in [
        (lambda: file.write_bytes(whole[:-9]), r"__0_1.distcp has \d+ bytes, .metadata asks for \d+ \(decoder"),
        (lambda: file.unlink(), r"__0_1.distcp is missing, .metadata names it for decoder"),
        (lambda: file.write_bytes(bytes(len(whole))), r"__0_1.distcp is damaged or truncated"),
    ]:
        damage()
        with pytest.raises(CheckpointError, match=message):
            run(mcore, out, "mcore", "hf")
        assert not out.exists()
        file.write_bytes(whole)
    metadata = mcore / "release/.metadata"
    metadata.write_bytes(metadata.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        run(mcore, out, "mcore", "hf")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pwned"),))


def test_no_pickle_runs_without_being_trusted(
    hf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(hf.parent)
    run(hf, hf.parent / "dist")
    run(hf, hf.parent / "legacy", ckpt_format="torch")
    legacy = hf.parent / "legacy/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(legacy, weights_only=False)
    torch.save({**content, "extra": Evil()}, legacy)
    (hf.parent / "dist/release/.metadata").write_bytes(pickle.dumps(Evil()))
    for name in ("dist", "legacy"):
        with pytest.raises(CheckpointError, match="trust-pickle"):
            run(hf.parent / name, hf.parent / "out", "mcore", "hf")
    assert not Path("pwned").exists()
    run(hf.parent / "legacy", hf.parent / "out", "mcore", "hf", trust_pickle=True)
    assert Path("pwned").exists() and "--trust-pickle" in caplog.text
    assert_same(hf, hf.parent / "out")


def test_legacy_files_of_megatron_itself_are_read(hf: Path) -> None:
    """With args and without conversion.json, as Megatron-LM writes them; then a rank is lost."""
    mcore = hf.parent / "mcore"
    run(hf, mcore, ckpt_format="torch", tensor_model_parallel_size=3, pipeline_model_parallel_size=2)
    for name in ("conversion.json", "model_config.json"):
        (mcore / name).unlink()
    run(mcore, hf.parent / "padded", "mcore", "hf")
    run(mcore, hf.parent / "back", "mcore", "hf", vocab_size=50)
    assert_same(hf, hf.parent / "back")
    file = mcore / "release/mp_rank_01_001/model_optim_rng.pt"
    # As megatron-core does when it is imported; `safe_globals` would take the registration back for tests after this.
    torch.serialization.add_safe_globals([Namespace])
    content = torch.load(file, weights_only=True)
    assert isinstance(content["args"], Namespace)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng.pt is damaged or truncated"):
        run(mcore, hf.parent / "out", "mcore", "hf")
    file.unlink()
    with pytest.raises(CheckpointError, match="mp_rank_01_001 has neither"):
        run(mcore, hf.parent / "out", "mcore", "hf")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "release/__0_0.distcp"),
        ({}, "release/common.pt"),
        ({"ckpt_format": "torch"}, "release/mp_rank_00/model_optim_rng.pt"),
    ],
)
def test_a_flipped_bit_in_a_conversion_is_noticed(hf: Path, tmp_path: Path, options: dict[str, str], name: str) -> None:
    run(hf, tmp_path / "out", **options)
    check_source(open_checkpoint(tmp_path / "out"))
    file = tmp_path / "out" / name
    content = bytearray(file.read_bytes())
    content[-1 if "common" in name else len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: its content is not what was written"):
        check_files(tmp_path / "out" / "release")
    if "common" not in name:  # damage of that one may already keep it from being opened
        with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
            load_checkpoint(tmp_path / "out")
        with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
            verify_checkpoints(VerifyOptions(first=hf, second=tmp_path / "out"))


def test_a_flipped_bit_in_an_export_is_noticed(hf: Path, tmp_path: Path) -> None:
    run(hf, tmp_path / "mcore")
    run(tmp_path / "mcore", tmp_path / "back", from_="mcore", to="hf")
    file = sorted((tmp_path / "back").glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        load_checkpoint(tmp_path / "back")
