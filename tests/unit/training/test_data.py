"""From the data configuration to loaders: the tokenizer must be the one that wrote the ids."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_multiverse.config import TrainConfig
from megatron_multiverse.data.loader import SFTLoader
from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.tokenizers import build_tokenizer
from megatron_multiverse.errors import ConfigError, DataError
from megatron_multiverse.training.data import build_loaders, check_tokenizer, open_tokenizer, warn_of_missing_manifest
from megatron_multiverse.training.microbatches import streaming
from megatron_multiverse.training.trainer import train
from megatron_multiverse.training.trial import try_steps

TOKENIZER = Path(__file__).parents[3] / "examples" / "quickstart" / "model"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("set")
    rows = [{"prompt": f"{k} + 1 = ", "response": str(k + 1)} for k in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PreprocessConfig(
        input=str(folder / "rows.jsonl"), output_prefix=str(folder / "set"), tokenizer_model=str(TOKENIZER), workers=1
    )
    preprocess_data(options)
    return str(folder / "set")


def other_tokenizer(folder: Path) -> Path:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TOKENIZER)
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["normalizer"] = {"type": "Lowercase"}  # the same ids, but other ones for the same text
    file.write_text(json.dumps(values))
    return folder


def run_config(prefix: str, tokenizer: Path, **changes: object) -> TrainConfig:
    data = {"data_prefixes": [prefix], "tokenizer_model": str(tokenizer), "seq_length": 64, "num_workers": 0}
    start = {"model_preset": "tiny"} if "init_from" not in changes else {}
    return TrainConfig.from_dict({"data": data, "checkpoint": {"save": "unused"}, **start, **changes})


def loaders(config: TrainConfig, vocab_size: int = 320) -> tuple[SFTLoader, SFTLoader | None]:
    """What a run does before and after its ranks have met."""
    return build_loaders(config, open_tokenizer(config, vocab_size))


def test_the_tokenizer_that_wrote_the_data_is_accepted_from_any_folder(prefix: str, tmp_path: Path) -> None:
    build_tokenizer("HuggingFaceTokenizer", TOKENIZER).save(tmp_path)
    loader, valid = loaders(run_config(prefix, tmp_path))
    assert next(iter(loader))["input_ids"].shape == (1, 64)
    assert valid is None


def test_another_tokenizer_is_refused_before_ranks_meet_and_a_gpu_is_touched(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(prefix, other_tokenizer(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)  # so that joining would be refused, by another error
    for start in (train, lambda config: try_steps(config, 2)):
        with pytest.raises(ConfigError, match=r"was made with the tokenizer .*name the same tokenizer"):
            start(config)


def test_a_damaged_manifest_is_named_and_a_missing_one_is_told(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TOKENIZER)
    (tmp_path / "set_manifest.json").write_text('{"key": ')
    with pytest.raises(DataError, match=r"set_manifest\.json is damaged"):
        check_tokenizer(str(tmp_path / "set"), tokenizer, "x")
    (tmp_path / "set_manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"set_manifest\.json is damaged \(it has no 'tokenizer_sha256'\)"):
        check_tokenizer(str(tmp_path / "set"), tokenizer, "x")
    check_tokenizer(str(tmp_path / "none"), tokenizer, "x")
    warn_of_missing_manifest(str(tmp_path / "none"))
    assert "cannot tell whether" not in caplog.text, "where there is no data, that is what is told"
    (tmp_path / "none.bin").touch()
    warn_of_missing_manifest(str(tmp_path / "none"))
    assert "cannot tell whether" in caplog.text


def test_a_file_in_place_of_its_prefix_is_told_from_a_missing_one(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no {prefix}\.bin\.bin: .* name it without its ending, {prefix}$"):
        loaders(run_config(f"{prefix}.bin", TOKENIZER))
    with pytest.raises(DataError, match=r"no .*absent\.bin; make it with tools/preprocess_data\.py"):
        loaders(run_config(str(tmp_path / "absent"), TOKENIZER))
    with pytest.raises(DataError, match=r"several prefixes, write '\[A, B\]', without weights"):
        loaders(run_config(f"0.7,{prefix},0.3,{prefix}", TOKENIZER))


def test_the_log_says_how_many_steps_an_epoch_or_the_mixture_is(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(prefix, TOKENIZER, train_iters=7)
    with caplog.at_level(logging.INFO):
        loader, _ = loaders(config)
        mixture = {"plain_prefixes": (prefix,), "mixture": (0.0, 1.0, 0.5), "global_batch_size": 2}
        mixed, _ = loaders(dataclasses.replace(config, data=dataclasses.replace(config.data, **mixture)))
    rows, all_rows = loader.count_packs(1), mixed.count_packs(3)
    assert f"an epoch is {rows} rows of 64 tokens, {rows}.0 steps; train_iters is 7" in caplog.text
    assert f"the 3 epochs of data.mixture are {all_rows} rows of 64 tokens, {all_rows / 2:.1f} steps" in caplog.text
    assert mixed.mixture is not None and (mixed.mixture.num_structured, mixed.mixture.num_documents) == (8, 16)


def test_a_validation_reads_no_row_twice(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(prefix, TOKENIZER, eval_iters=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, valid_prefixes=(prefix,), seq_length=16))
    with caplog.at_level(logging.INFO):
        _, valid = loaders(config)
        assert valid is not None
        rows = valid.count_packs(1)
        loaders(dataclasses.replace(config, eval_iters=rows + 1))
    assert rows > 2 and len(list(valid)) == rows, "it ends after them"
    assert f"a validation reads 2 of the {rows} rows of the validation set (eval_iters is 2)" in caplog.text
    assert f"a validation reads the whole validation set: {rows} rows" in caplog.text


def test_a_loader_process_that_is_killed_during_a_step_is_told(prefix: str) -> None:
    config = run_config(prefix, TOKENIZER)
    loader, _ = loaders(dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=1)))
    others = set(multiprocessing.active_children())
    with (
        pytest.raises(
            DataError, match=r"^a process that loads data ended \(DataLoader worker \(pid \d+\) is killed by sig"
        ),
        streaming(loader) as batches,
    ):
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - others
        worker.kill()
        time.sleep(60)  # a step, which torch's handler of SIGCHLD interrupts
    with pytest.raises(RuntimeError, match="another"), streaming(loader) as batches:
        raise RuntimeError("another")


def test_a_model_has_at_least_as_many_rows_as_the_tokenizer_has_ids(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"the model has 200 rows for the \d+ ids"):
        open_tokenizer(run_config(prefix, TOKENIZER), 200)


def test_responses_without_an_end_are_told(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaders(run_config(prefix, TOKENIZER))
    assert "will not learn to end its answers: preprocess with --append-eod" in caplog.text
    caplog.clear()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "response": "2"}\n')
    options = PreprocessConfig(
        input=str(tmp_path / "rows.jsonl"), output_prefix=str(tmp_path / "ended"), tokenizer_model=str(TOKENIZER),
        workers=1, append_eod=True,
    )  # fmt: skip
    preprocess_data(options)
    loaders(run_config(str(tmp_path / "ended"), TOKENIZER))
    assert "end its answers" not in caplog.text


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (".bin", lambda data: data[:-6], r"set\.bin has \d+ bytes, .*set\.idx asks for \d+: one of them is cut off"),
        (".bin", lambda data: data + b"\0\0", r"set\.bin has \d+ bytes"),
        (".bin", lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], r"set\.bin is not the file that"),
        (".bin", lambda data: data[::-1], r"set\.bin is not the file that .*set_manifest\.json speaks of"),
        (".idx", lambda data: data[:-9], r"set\.idx is damaged"),
        (".idx", lambda data: data[:20], r"set\.idx is damaged"),
        (".idx", lambda data: b"x" + data[1:], r"set\.idx is damaged"),
        (".idx", lambda data: data[:34] + bytes(4) + data[38:], r"set\.idx is damaged \(its lengths and places"),
        ("_manifest.json", lambda data: data.replace(b'"documents": 8', b'"documents": 9'), r"8 documents, .* says 9"),
        ("_manifest.json", lambda data: data[:50], r"set_manifest\.json is damaged"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # nor does a half-opened file complain
def test_files_that_do_not_belong_together_are_named_when_they_are_opened(
    prefix: str, tmp_path: Path, file: str, change: Callable[[bytes], bytes], message: str
) -> None:
    for suffix in (".bin", ".idx", "_manifest.json"):
        data = Path(prefix + suffix).read_bytes()
        (tmp_path / f"set{suffix}").write_bytes(change(data) if suffix == file else data)
    with pytest.raises(DataError, match=message) as caught:
        loaders(run_config(str(tmp_path / "set"), TOKENIZER))
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
