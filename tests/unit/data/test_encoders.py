"""gigatoken is used where its ids are right, and is found out where they are not."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_multiverse.data import encoders
from megatron_multiverse.data.encoders import DifferentIds, GigatokenEncoder, PlainEncoder, choose_encoder
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.responses import ResponseReader
from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer, build_tokenizer
from megatron_multiverse.data.work_folder import WorkFolder
from megatron_multiverse.structure import TAGS
from tests.unit.data.conftest import CORPUS, SEQUENTIAL, TRAJECTORY
from tests.unit.data.test_preprocess import BREAKS, TOLERATED

ROWS = 40
WRONG = "What is 5?"
needs_gigatoken = pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")


@pytest.fixture
def tokenizer(hf_folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(hf_folder)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows in several shards; in none of them is a wrong row the first one."""
    monkeypatch.setattr("megatron_multiverse.data.sources._shard_bytes", lambda total: total // 3)
    rows = [{"prompt": f"What is {k}?", "response": TRAJECTORY if k % 3 else SEQUENTIAL} for k in range(ROWS)]
    rows += [{"prompt": "broken", "response": text} for text, _ in BREAKS.values()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(source: Path, prefix: Path, hf_folder: Path, **options: object) -> dict[str, bytes]:
    """Everything a run has written, but for the paths in its manifest."""
    config = {"workers": 2, "tokenizer_model": str(hf_folder), "max_rejected": 1000} | options
    preprocess_data(PreprocessConfig(input=str(source), output_prefix=str(prefix), **config))  # type: ignore[arg-type]
    return {
        suffix: Path(f"{prefix}{suffix}").read_bytes()
        for suffix in (".bin", ".idx", "_rejected.jsonl", "_manifest.json")
    }


def _make_wrong(monkeypatch: pytest.MonkeyPatch, is_wrong: object) -> None:
    """Let gigatoken give another last id for some texts."""
    right = GigatokenEncoder._encode

    def encode(self: GigatokenEncoder, text: str) -> encoders.IdArray:
        ids = right(self, text)
        return np.append(ids[:-1], np.uint32(5)) if is_wrong(text) else ids  # type: ignore[operator]

    monkeypatch.setattr(GigatokenEncoder, "_encode", encode)


def _check_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_CHECKED_SHARE", float(encoders._CHECKED_CHARACTERS))


@needs_gigatoken
def test_outputs_are_those_of_the_plain_encoder(tmp_path, source, hf_folder, caplog) -> None:
    caplog.set_level(logging.INFO)
    fast = _run(source, tmp_path / "fast", hf_folder)
    assert "encoding with gigatoken" in caplog.text
    assert fast == _run(source, tmp_path / "plain", hf_folder, encoder="tokenizers")


@needs_gigatoken
def test_every_id_of_gigatoken_is_compared_if_asked_to(tokenizer, monkeypatch) -> None:
    _check_every_text(monkeypatch)
    texts = [*CORPUS, *TAGS, "".join(TAGS), "", " ", "\n\n", "é e\u0301", "<Path", *TOLERATED.values()]
    ids = GigatokenEncoder(tokenizer, tokenizer.to_json()).encode(texts)
    assert [array.tolist() for array in ids] == tokenizer.tokenize_batch(texts)
    assert [array.tolist() for array in PlainEncoder(tokenizer).encode(texts)] == tokenizer.tokenize_batch(texts)


@needs_gigatoken
def test_texts_with_a_character_that_is_read_in_another_way_go_to_the_other(tmp_path, hf_folder, monkeypatch) -> None:
    """tokenizers 0.23 leaves marks of young Unicode versions where they are; gigatoken sorts them as Unicode says."""
    content = json.loads((hf_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    encoder = GigatokenEncoder(tokenizer, tokenizer.to_json())
    texts = [
        "\u07f3\u07fd",
        "e\u0301\u0323 e\u0323\u0301 \u00e9",
        "\U0001f469\u200d\U0001f4bb \u4f60\u597d",
        "\u180e \u017f",
        "a",
    ]
    right = tokenizer.tokenize_batch(texts)
    assert encoder._encode(texts[0]).tolist() != right[0]  # or there would be no need for any of this
    assert [ids.tolist() for ids in encoder.encode(texts)] == right
    encoded: list[str] = []
    encode = GigatokenEncoder._encode
    monkeypatch.setattr(GigatokenEncoder, "_encode", lambda self, text: (encoded.append(text), encode(self, text))[1])
    assert [ids.tolist() for ids in encoder.encode(texts)] == right
    assert encoded == texts[1:]  # no character is tried again


@needs_gigatoken
def test_wrong_ids_in_the_sample_are_told_and_not_used(tmp_path, source, hf_folder, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    plain = _run(source, tmp_path / "plain", hf_folder, encoder="tokenizers")
    _make_wrong(monkeypatch, lambda text: text == "What is 0?")
    assert _run(source, tmp_path / "out", hf_folder) == plain
    assert "encoding with tokenizers: gigatoken gives [5] where tokenizers gives" in caplog.text
    assert "at '?'" in caplog.text


@needs_gigatoken
def test_wrong_ids_found_on_the_way_undo_what_was_written(tmp_path, source, hf_folder, monkeypatch, caplog) -> None:
    plain = _run(source, tmp_path / "plain", hf_folder, encoder="tokenizers")
    _make_wrong(monkeypatch, lambda text: text == WRONG)
    wrong = _run(source, tmp_path / "unseen", hf_folder)  # too little text for a check at random
    assert wrong[".bin"] != plain[".bin"]
    _check_every_text(monkeypatch)
    assert _run(source, tmp_path / "out", hf_folder) == plain
    assert "what gigatoken has encoded is encoded again with tokenizers" in caplog.text


@needs_gigatoken
def test_a_text_that_gigatoken_cannot_read_is_read_by_the_other(tmp_path, source, hf_folder, monkeypatch) -> None:
    class Panic(BaseException):
        pass

    class Broken:
        def encode(self, text: str) -> None:
            raise Panic("index out of bounds")

    right = GigatokenEncoder._encode

    def encode(self: GigatokenEncoder, text: str) -> encoders.IdArray:
        if text == WRONG:
            self._fast = Broken()
        return right(self, text)

    plain = _run(source, tmp_path / "plain", hf_folder, encoder="tokenizers")
    monkeypatch.setattr(GigatokenEncoder, "_encode", encode)
    assert _run(source, tmp_path / "out", hf_folder) == plain


def test_a_resumed_run_knows_what_was_distrusted(tmp_path) -> None:
    key = "0" * 64
    with WorkFolder(str(tmp_path / "out"), key) as folder:
        assert folder.distrusted is None
        for number, encoder in enumerate(("gigatoken", "plain")):
            for suffix in (".bin", ".npy"):
                folder.part(number).with_suffix(suffix).touch()
            folder.part(number).with_suffix(".json").write_text(json.dumps({"encoder": encoder}))
        folder.distrust("gigatoken", "wrong ids")
        assert [folder.is_finished(number) for number in range(2)] == [False, True]
    with WorkFolder(str(tmp_path / "out"), key) as folder:
        assert folder.distrusted == "wrong ids"
        assert folder.is_finished(1)


def test_without_gigatoken_the_log_says_how_to_get_it(tokenizer, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert isinstance(choose_encoder(tokenizer, list), PlainEncoder)
    assert "pip install 'megatron-multiverse[fast]'" in caplog.text


@needs_gigatoken
def test_tokenizers_it_does_not_know_are_left_to_the_other(tmp_path, caplog) -> None:
    from tokenizers import Tokenizer, decoders, models

    caplog.set_level(logging.INFO)
    pieces = [*map(chr, range(33, 127)), "\n", "▁", "<unk>"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=len(pieces) - 1))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert isinstance(choose_encoder(HuggingFaceTokenizer(tmp_path), list), PlainEncoder)
    (told,) = [record.getMessage() for record in caplog.records if "gigatoken does not know" in record.getMessage()]
    assert "Unigram" in told and "\n" not in told


@needs_gigatoken
def test_grown_caches_are_thrown_away(tokenizer, monkeypatch) -> None:
    encoder = GigatokenEncoder(tokenizer, tokenizer.to_json())
    loads: list[int] = []
    load = GigatokenEncoder._load
    monkeypatch.setattr(GigatokenEncoder, "_load", lambda self: (loads.append(1), load(self)))
    texts = [TRAJECTORY, SEQUENTIAL]
    most = encoders._MAX_GROWTH_BYTES
    # Bytes of the process at each batch, which otherwise other tests decide; how often caches were thrown away then.
    for rss, count in ((100, 0), (90, 0), (100 + most, 0), (101 + most, 1), (300 + most, 1), (290 + 2 * most, 1),
                       (301 + 2 * most, 2)):  # fmt: skip
        size = SimpleNamespace(memory_info=lambda rss=rss: SimpleNamespace(rss=rss))
        monkeypatch.setattr("psutil.Process", lambda size=size: size)
        assert [ids.tolist() for ids in encoder.encode(texts)] == tokenizer.tokenize_batch(texts)
        assert len(loads) == count


@needs_gigatoken
def test_the_message_names_the_place(tokenizer, monkeypatch) -> None:
    encoder = GigatokenEncoder(tokenizer, tokenizer.to_json())
    encoder.check("1 + 2 = 3")
    monkeypatch.setattr(encoder, "_encode", lambda text: np.array(tokenizer.tokenize(text)[:-1], dtype=np.uint32))
    with pytest.raises(DifferentIds, match=r"gigatoken gives \[\] where tokenizers gives \[\d+\], at ' 3'"):
        encoder.check("1 + 2 = 3")


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_a_batch_of_responses_is_read_as_one_by_one(kind, hf_folder, sentencepiece_file) -> None:
    tokenizer = build_tokenizer(kind, hf_folder if kind == "HuggingFaceTokenizer" else sentencepiece_file)
    end = tokenizer.id_to_text[tokenizer.eod] if kind == "HuggingFaceTokenizer" else ""
    texts = [text for text, _ in BREAKS.values()] + list(TOLERATED.values())
    texts += [TRAJECTORY + end, end or " ", f"a{end}b", TRAJECTORY.replace("1: add", "1:add")]
    ids = PlainEncoder(tokenizer).encode(texts)
    reader = ResponseReader(tokenizer)
    valid = 0
    for text, encoded, result in zip(texts, ids, reader.read_batch(texts, ids), strict=True):
        alone = reader._read_or_error(text, encoded)
        assert type(result) is type(alone)
        if isinstance(result, Exception):
            assert (str(result), vars(result)) == (str(alone), vars(alone))
        else:
            valid += 1
            assert (result.ids.tolist(), result.statistics, result.ended) == (
                alone.ids.tolist(),
                alone.statistics,
                alone.ended,
            )
    assert valid >= len(TOLERATED)
