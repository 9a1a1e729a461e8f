"""Rows to .bin/.idx: the same bytes as megatron-core, nothing lost, resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_multiverse.data.indexed_writer import ShardWriter, join_shards, optimal_dtype
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.sft_dataset import SFTDataset, pack_arrays
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.structure import Block, Tag, render
from tests.unit.data.conftest import SEQUENTIAL, TRAJECTORY, train_sentencepiece
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "preprocess_data.py"


def _write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"What is {k}?", "response": TRAJECTORY if k % 3 else SEQUENTIAL} for k in range(count)]


def _config(input_path: Path, prefix: Path, hf_folder: Path, **options: object) -> PreprocessConfig:
    base: dict[str, object] = {"workers": 1, "tokenizer_model": str(hf_folder)}
    return PreprocessConfig(input=str(input_path), output_prefix=str(prefix), **(base | options))


def _bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def _megatron_bytes(prefix: Path, documents: list[tuple[list[int], list[int]]], vocab_size: int) -> tuple[bytes, bytes]:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        for ids in document:
            builder.add_item(torch.IntTensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return _bytes(prefix)


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_bytes_equal_megatron_core(tmp_path, hf_folder, sentencepiece_file, monkeypatch, kind, append_eod):
    from megatron_multiverse.data.tokenizers import build_tokenizer

    monkeypatch.setattr("megatron_multiverse.data.sources._shard_bytes", lambda total: total // 5)
    rows = _rows(21)
    model = hf_folder if kind == "HuggingFaceTokenizer" else sentencepiece_file
    source = _write_rows(tmp_path / "rows.jsonl", rows)
    preprocess_data(_config(source, tmp_path / "out", model, tokenizer_type=kind, append_eod=append_eod, workers=2))
    tokenizer = build_tokenizer(kind, model)
    tail = [tokenizer.eod] if append_eod else []
    documents = [(tokenizer.tokenize(r["prompt"]), tokenizer.tokenize(r["response"]) + tail) for r in rows]
    assert _bytes(tmp_path / "out") == _megatron_bytes(tmp_path / "theirs", documents, tokenizer.vocab_size)


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 151_680])
def test_writer_bytes_equal_megatron_core_for_every_dtype(tmp_path, vocab_size):
    rng = np.random.default_rng(0)
    documents = [tuple(rng.integers(0, vocab_size, rng.integers(0, 9)) for _ in range(2)) for _ in range(50)]
    dtype = optimal_dtype(vocab_size)
    parts = [tmp_path / f"{k:05d}" for k in range(3)]
    for k, part in enumerate(parts):
        writer = ShardWriter(part, dtype, vocab_size)
        for start in range(k * 25, (k + 1) * 25, 10):  # the last shard stays empty
            writer.add(documents[start : min(start + 10, (k + 1) * 25)])
        writer.close()
    join_shards(parts, str(tmp_path / "out"), dtype, work_folder=tmp_path)
    assert _bytes(tmp_path / "out") == _megatron_bytes(tmp_path / "theirs", documents, vocab_size)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "x", optimal_dtype(10), 10)
    with pytest.raises(DataError, match="leave the vocabulary of 10"):
        writer.add([(np.array([1]), np.array([10]))])


def test_real_trajectories_all_pass_and_decode_byte_for_byte(tmp_path, samples_folder, hf_folder):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_multiverse.data.input_files import trajectory_files
    from megatron_multiverse.data.tokenizers import build_tokenizer

    result = preprocess_data(_config(samples_folder, tmp_path / "out", hf_folder, append_eod=True))
    files = trajectory_files(samples_folder)
    assert (result.totals.documents, result.totals.rejected.total()) == (len(files), 0)
    assert result.totals.blocks > len(files)
    assert not (tmp_path / "out_rejected.jsonl").exists()
    tokenizer = build_tokenizer("HuggingFaceTokenizer", hf_folder)
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert len(dataset) == 2 * len(files)
    for k, file in enumerate(files):
        prompt, response = dataset[2 * k], dataset[2 * k + 1]
        assert len(prompt) == 0 and response[-1] == tokenizer.eod
        assert tokenizer.detokenize(response[:-1].tolist()).encode() == file.read_bytes()


def nested(depth: int) -> str:
    """Blocks of one path, one inside the other."""
    block = Block(("a",), (("b",),), "c")
    for _ in range(depth - 1):
        block = Block(("a",), (("b", block, "c"),), "d")
    return render((block,))


SURPLUS = "\n<Path>\n3: x\n</Path>"
BREAKS = {
    "left open at the budget": (TRAJECTORY[: TRAJECTORY.index("so 3")], "unclosed"),
    "open conclusion": (TRAJECTORY[: TRAJECTORY.index("both agree")], "unclosed"),
    "stray token after a path": (TRAJECTORY.replace("</Path>\n<Path>\n2: x", "</Path>6\n<Path>\n2: x"), "gap"),
    "doubled path end": (TRAJECTORY.replace("so 3\n</Path>", "so 3\n</Path>\n</Path>"), "stray_tag"),
    "path end outside a block": (SEQUENTIAL.replace("is", "</Path>"), "stray_tag"),
    "surplus path": (TRAJECTORY.replace("\n<Conclusion>\nboth", SURPLUS + "\n<Conclusion>\nboth"), "path_count"),
    "missing path": (TRAJECTORY.replace("\n<Path>\n2: x < y holds\n</Path>", ""), "path_count"),
    "outline inside a path": (TRAJECTORY.replace("so 3", "<Outline>\n1: x\n</Outline>"), "stray_tag"),
    "nested think": (SEQUENTIAL.replace("is", "<Think>"), "stray_tag"),
    "repeated think": (SEQUENTIAL + "\n" + SEQUENTIAL, "stray_tag"),
    "think left open": (SEQUENTIAL.removesuffix("</Think>"), "unclosed"),
    "think end without start": (SEQUENTIAL.removeprefix("<Think>"), "stray_tag"),
    "path without end": (TRAJECTORY.replace("so 3\n</Path>\n", "so 3\n"), "stray_tag"),
    "gap in numbering": (TRAJECTORY.replace("2: check", "3: check"), "label_order"),
    "placeholder outline": (TRAJECTORY.replace("2: check x<y\n", ""), "label"),
    "path with another label": (TRAJECTORY.replace("2: x <", "1: x <"), "label_order"),
    "no newline in a gap": (TRAJECTORY.replace("</Goal>\n<Path>", "</Goal><Path>", 1), "gap"),
    "two newlines in a gap": (TRAJECTORY.replace("</Goal>\n<Path>", "</Goal>\n\n<Path>", 1), "gap"),
    "no conclusion": (TRAJECTORY.replace("<Conclusion>\nboth agree\n</Conclusion>\n", ""), "no_conclusion"),
    "nested deeper than the kernels": (nested(9), "too_deep"),
}  # fmt: skip
TOLERATED = {
    "raw less-than signs": SEQUENTIAL.replace("is", "a<b <c> < Path>"),
    "text after a nested block": TRAJECTORY,
    "nested block last in its path": TRAJECTORY.replace("\nso 3\n</Path>", "\n</Path>"),
    "block of one path": "<Think>\n<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n</Goal>\n<Path>\n1: b\n</Path>\n"
    "<Conclusion>\nc\n</Conclusion>\n</Parallel>\n</Think>",
    "path that names its sibling": TRAJECTORY.replace("x < y holds", "as in path 1, x < y holds"),
    "no tags at all": "just text",
    "nested as deep as the kernels": nested(8),
}


def test_malformed_rows_are_rejected_with_their_position_and_all_others_written(tmp_path, hf_folder, monkeypatch):
    monkeypatch.setattr("megatron_multiverse.data.sources._shard_bytes", lambda total: total // 6)
    rows, expected = [], {}
    for (name, (text, code)), good in zip(BREAKS.items(), [*TOLERATED.values()] * 9, strict=False):
        expected[len(rows) + 1] = (name, text, code)
        rows += [{"prompt": name, "response": text}, {"prompt": "tags are <Path> inert </Goal>", "response": good}]
    source = _write_rows(tmp_path / "rows.jsonl", rows)
    with source.open("a") as stream:
        stream.write("\n{broken\n")
    config = _config(source, tmp_path / "out", hf_folder, max_rejected=len(BREAKS), workers=2)
    result = preprocess_data(config)
    assert result.totals.documents == len(BREAKS)
    assert result.too_many_rejected
    report = [json.loads(line) for line in (tmp_path / "out_rejected.jsonl").read_text().splitlines()]
    assert report.pop() | {"message": ""} == {
        "row": 2 * len(BREAKS) + 2, "sample": f"rows.jsonl:{2 * len(BREAKS) + 2}", "reason": "json", "message": "",
        "char_index": 1,
    }  # fmt: skip
    found = {entry["row"]: entry for entry in report}
    assert {row: entry["reason"] for row, entry in found.items()} == {
        row: code for row, (_, _, code) in expected.items()
    }
    for row, (name, text, _) in expected.items():
        entry = found[row]
        assert entry["sample"] == f"rows.jsonl:{row}", name
        assert 0 <= entry["char_index"] <= len(text) and entry["token_index"] >= 0, name
        tag = entry["message"].removeprefix("found ").split(",")[0].split()[0]
        if tag.startswith("<") and entry["reason"] != "label":
            assert text[entry["char_index"] :].startswith(tag), name


def test_second_run_has_nothing_to_do(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(5))
    first = preprocess_data(_config(source, tmp_path / "out", hf_folder))
    before = os.stat(tmp_path / "out.bin").st_mtime_ns
    second = preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert os.stat(tmp_path / "out.bin").st_mtime_ns == before
    assert second.totals == first.totals
    assert not (tmp_path / "out.shards").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_second_run_makes_files_again_that_are_not_what_was_written(tmp_path, hf_folder, caplog, suffix):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(5))
    preprocess_data(_config(source, tmp_path / "out", hf_folder))
    whole = _bytes(tmp_path / "out")
    file = Path(f"{tmp_path / 'out'}{suffix}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    preprocess_data(_config(source, tmp_path / "out", hf_folder))
    assert _bytes(tmp_path / "out") == whole
    assert f"out{suffix} is not what was written there: making it again" in caplog.text


def test_tool_reports_and_fails_when_too_many_rows_are_rejected(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", [*_rows(3), {"prompt": "x", "response": "</Goal>"}])
    command = [
        sys.executable, str(TOOL), "--input", str(source), "--output-prefix", str(tmp_path / "out"),
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hf_folder), "--append-eod",
        "--json-keys", "prompt", "response", "--workers", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "1 rows rejected, --max-rejected allows 0" in done.stderr
    assert "documents   3 of 4 rows" in done.stdout and "docs/s" in done.stdout
    assert (tmp_path / "out.idx").exists()
    done = subprocess.run(
        [*command, "--max-rejected", "1"], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr


def test_documents_without_a_prompt_are_trained_from_their_first_token(tmp_path, hf_folder):
    """Continued pretraining: one column of text, with and without structure."""
    source = _write_rows(tmp_path / "rows.jsonl", [{"text": "as plain as can be"}, {"text": f"before {TRAJECTORY}"}])
    preprocess_data(_config(source, tmp_path / "out", hf_folder, json_keys=["text"]))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(hf_folder))
    plain, structured = SFTDataset(str(tmp_path / "out"), tokenizer.structure_vocab)
    row = pack_arrays([plain], len(plain.ids) + 3, tokenizer.pad)
    assert row["loss_mask"].tolist() == [1.0] * (len(plain.ids) - 1) + [0.0] * 4
    assert structured.problem is None
    positions = structured.layout.position_ids
    assert (np.diff(positions) < 0).any()  # its paths stand side by side
    untrained = (
        len(structured.ids) - 1 - pack_arrays([structured], len(structured.ids), tokenizer.pad)["loss_mask"].sum()
    )
    forced = {tokenizer.structure_vocab.tag_ids[tag] for tag in (Tag.PATH, Tag.CONCLUSION)}
    assert 0 < np.isin(structured.ids, list(forced)).sum() <= untrained < len(structured.ids) // 2


def test_help_teaches_without_torch(tmp_path):
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('heavy', {'torch', 'transformers'} & set(sys.modules)))\n"
        f"sys.argv = ['preprocess_data.py', '--help']; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--input", "--output-prefix", "--tokenizer-type", "--workers", "--append-eod", "--max-rejected"):
        assert flag in done.stdout
    assert "heavy set()" in done.stdout


def test_wrong_tokenizer_is_a_clear_error(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(1))
    with pytest.raises(ConfigError, match="must be one of"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder, tokenizer_type="GPT2BPETokenizer"))


def test_end_token_and_template_must_exist(tmp_path, hf_folder):
    source = _write_rows(tmp_path / "rows.jsonl", _rows(1))
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="names no end token"):
        preprocess_data(_config(source, tmp_path / "out", tmp_path, append_eod=True))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|gone|>"}')
    with pytest.raises(ConfigError, match=r"names the end token '<\|gone\|>', which is not in its vocabulary"):
        preprocess_data(_config(source, tmp_path / "out", tmp_path, append_eod=True))
    with pytest.raises(ConfigError, match="no chat template"):
        preprocess_data(_config(source, tmp_path / "out", hf_folder, chat_template="always"))


def test_question_rows_go_through_the_chat_template(tmp_path, hf_folder):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_multiverse.data.tokenizers import build_tokenizer

    build_tokenizer("HuggingFaceTokenizer", hf_folder).save(tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>")
    row = {"question": "1+2?", "deepseek_thinking_trajectory": "three", "deepseek_attempt": "3", "solution": "3"}
    source = _write_rows(tmp_path / "rows.jsonl", [row])
    preprocess_data(_config(source, tmp_path / "out", tmp_path / "chat"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", hf_folder)
    dataset = IndexedDataset(str(tmp_path / "out"))  # its arrays are views that die with it
    prompt, response = (tokenizer.detokenize(ids.tolist()) for ids in dataset[0:2])
    assert prompt == "<u>1+2? Think step by step before answering.<a>"
    assert response == "<Think>\nthree\n</Think>\n\nAnswer: 3"


def _write_as(path, rows):
    """Rows in the format that the ending of `path` names; without one, a saved Hugging Face data set."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_conversations_about_tools_are_rejected_in_every_format(tmp_path, glued_folder, suffix, caplog):
    """Their prompts would not show the tools."""
    turns = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": SEQUENTIAL}]
    rows = [{"messages": turns, "tools": tools} for tools in ([], [{"type": "function"}], None)]
    source = tmp_path / f"rows{suffix}"
    _write_as(source, rows)
    with caplog.at_level("INFO"):
        result = preprocess_data(_config(source, tmp_path / "out", glued_folder, max_rejected=1))
    assert (result.totals.documents, result.totals.rejected) == (2, {"tools": 1})
    assert "columns messages" in caplog.messages


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_conversations_go_through_the_chat_template(tmp_path, glued_folder, suffix):
    """All turns but the last are the prompt, as the server renders them; that turn is trained, and no other."""
    turns = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": TRAJECTORY},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": SEQUENTIAL},
    ]
    source = tmp_path / f"rows{suffix}"
    _write_as(source, [{"messages": turns, "id": 7}])
    preprocess_data(_config(source, tmp_path / "out", glued_folder, append_eod=True))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", glued_folder)
    dataset = SFTDataset(str(tmp_path / "out"), tokenizer.structure_vocab)
    ids, layout = dataset[0].ids.tolist(), dataset[0].layout
    before = tokenizer.render_chat(turns[:-1])
    assert before.endswith("Sure?<|im_end|>\n<|im_start|>a")
    assert tokenizer.detokenize(ids) == before + SEQUENTIAL + "<|im_end|>"
    assert dataset.prompt(0) == tokenizer.tokenize(before)
    assert not layout.loss_mask()[: len(dataset.prompt(0))].any() and layout.loss_mask()[-1]
    for options, lacks in (
        ({"chat_template": "never"}, "is never: leave it out"),
        ({"tokenizer_model": "PLAIN"}, "put one, as chat_te"),
    ):
        if options.get("tokenizer_model"):
            options["tokenizer_model"] = str(_without_template(glued_folder, tmp_path / "plain"))
        with pytest.raises(ConfigError, match=lacks):
            preprocess_data(_config(source, tmp_path / "no", glued_folder, **options))


def _without_template(folder: Path, copy: Path) -> Path:
    copy.mkdir()
    (copy / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    return copy


@pytest.mark.parametrize(("rule", "changed"), [("identity", 0), ("nmt_nfkc", 1)])
def test_tokenizer_that_changes_text_is_reported(tmp_path, rule, changed):
    model = train_sentencepiece(tmp_path / "sp", normalization_rule_name=rule)
    source = _write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "x\u00b2 is \uff11"}])
    result = preprocess_data(_config(source, tmp_path / "out", model, tokenizer_type="SentencePieceTokenizer"))
    assert result.totals.changed_texts == changed
    assert any("do not decode to themselves" in line for line in result.totals.lines()) == bool(changed)
