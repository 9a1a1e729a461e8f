"""Documents to training arrays: the loss mask against the labels, position ids, who sees whom."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_multiverse.data.indexed_writer import ShardWriter, join_shards, optimal_dtype
from megatron_multiverse.data.sft_dataset import SFTDataset, pack_arrays
from megatron_multiverse.errors import DataError
from megatron_multiverse.structure import TAGS, StructureVocab
from tests.random_tags import VOCAB as TREES
from tests.random_tags import deep_tags, write

PIECES = [*TAGS, "\n", "1:", "2:", "a", "b", "c", "d", "end", "pad"]
VOCAB = StructureVocab.from_pieces(PIECES)
PAD = PIECES.index("pad")


def _ids(text: str) -> np.ndarray:
    return np.array([PIECES.index("\n" if word == "n" else word) for word in text.split()], dtype=np.int64)


def write_documents(
    prefix: Path, documents: list[tuple[np.ndarray, np.ndarray]], vocab: StructureVocab = VOCAB
) -> SFTDataset:
    dtype = optimal_dtype(200)
    part = prefix.with_name("00000")
    writer = ShardWriter(part, dtype, 200)
    writer.add(documents)
    writer.close()
    join_shards([part], str(prefix), dtype)
    return SFTDataset(str(prefix), vocab)


# Columns: token, position, trained as a target (0 no, 1 yes, f only with train_forced_tokens), keys it cannot see.
TABLE = """
<Path>        0 0 -
<Parallel>    1 1 -
n             2 1 -
<Goal>        3 1 -
n             4 1 -
<Outline>     5 1 -
n             6 1 -
1:            7 1 -
</Outline>    8 1 -
n             9 1 -
<Outline>    10 1 -
n            11 1 -
2:           12 1 -
</Outline>   13 1 -
n            14 1 -
</Goal>      15 1 -
n            16 f -
<Path>       17 f -
n            18 f -
1:           19 f -
a            20 1 -
b            21 1 -
</Path>      22 1 -
n            16 0 16-22
<Path>       17 f 16-22
n            18 f 16-22
2:           19 f 16-22
c            20 1 16-22
</Path>      21 1 16-22
n            23 0 -
<Conclusion> 24 f -
d            25 1 -
</Conclusion> 26 1 -
n            27 1 -
</Parallel>  28 1 -
end          29 1 -
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]


@pytest.fixture(scope="module")
def table_set(tmp_path_factory) -> SFTDataset:
    ids = _ids(" ".join(row[0] for row in ROWS))
    folder = tmp_path_factory.mktemp("table")
    # The first token is the prompt: its tag is inert.
    return write_documents(folder / "set", [(ids[:1], ids[1:]), (_ids("a b"), _ids("c end")), (_ids(""), _ids("d a"))])


@pytest.mark.parametrize("train_forced_tokens", [False, True])
def test_table_token_label_mask_position_and_visible_keys(table_set, train_forced_tokens):
    n = len(ROWS)
    arrays = pack_arrays([table_set[0]], n, PAD, train_forced_tokens=train_forced_tokens)
    assert [PIECES[token].replace("\n", "n") for token in arrays["input_ids"]] == [row[0] for row in ROWS]
    assert arrays["position_ids"].tolist() == [int(row[1]) for row in ROWS]
    assert arrays["labels"].tolist() == [*arrays["input_ids"][1:].tolist(), PAD]
    trained = {"1", "f"} if train_forced_tokens else {"1"}
    assert arrays["loss_mask"].tolist() == [float(row[2] in trained) for row in ROWS[1:]] + [0.0]
    r = arrays["r"]
    for i, row in enumerate(ROWS):
        first, last = map(int, row[3].split("-")) if row[3] != "-" else (n, n)
        hidden = [j for j in range(i + 1) if r[j] > r[i]]
        assert hidden == list(range(first, min(last, i) + 1)), (i, row)


def test_pack_keeps_documents_apart_and_never_trains_across(table_set):
    arrays = pack_arrays([table_set[1], table_set[2], table_set[1]], 13, PAD)
    assert [PIECES[token] for token in arrays["input_ids"]] == [
        "a", "b", "c", "end", "d", "a", "a", "b", "c", "end", "pad", "pad", "pad",
    ]  # fmt: skip
    #                                     a  b  c  e  d  a  a  b  c  e  p  p  p: is the next token trained?
    assert arrays["loss_mask"].tolist() == [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert arrays["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 1, 2]
    r, owner = arrays["r"], [0] * 4 + [1] * 2 + [2] * 4 + [3] * 3
    for i in range(13):
        assert [j for j in range(i + 1) if r[j] <= r[i]] == [j for j in range(i + 1) if owner[j] == owner[i]]
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "input_ids": "int64", "labels": "int64", "loss_mask": "float32", "position_ids": "int64", "r": "int32",
        "documents": "int32", "sample_ids": "int64", "malformed": "bool",
    }  # fmt: skip
    assert arrays["documents"].tolist() == [
        [0, 2],
        [4, 4],
        [6, 8],
        [10, 13],
    ]  # padding begins at 10 and has no response
    assert arrays["sample_ids"].tolist() == [1, 2, 1, -1]
    assert not arrays["malformed"].any()


def test_unused_document_rows_lie_at_the_end_and_too_few_rows_are_refused(table_set):
    arrays = pack_arrays([table_set[1]], 4, PAD, num_documents=4)
    assert arrays["documents"].tolist() == [[0, 2], [4, 4], [4, 4], [4, 4]]
    assert arrays["sample_ids"].tolist() == [1, -1, -1, -1]
    with pytest.raises(ValueError, match=r"num_documents \(1\) must exceed"):
        pack_arrays([table_set[1]], 4, PAD, num_documents=1)


def test_several_prefixes_follow_one_another(tmp_path, table_set):
    write_documents(tmp_path / "more", [(_ids("d"), _ids("d end"))])
    both = SFTDataset([table_set.prefixes[0], str(tmp_path / "more")], VOCAB)
    assert both.lengths.tolist() == [len(ROWS), 4, 2, 3]
    assert both[3].ids.tolist() == _ids("d d end").tolist()
    assert both[1].ids.tolist() == table_set[1].ids.tolist()
    assert both.fingerprint() != table_set.fingerprint()
    twice = SFTDataset(table_set.prefixes * 2, VOCAB)
    assert twice.lengths.tolist() == table_set.lengths.tolist() * 2, "there are no weights but this"


def test_fingerprint_sees_other_tokens_of_the_same_lengths(tmp_path):
    left = write_documents(tmp_path / "a", [(_ids("a"), _ids("b c")), (_ids("a"), _ids("d"))])
    copy = write_documents(tmp_path / "b", [(_ids("a"), _ids("b c")), (_ids("a"), _ids("d"))])
    other = write_documents(tmp_path / "c", [(_ids("a"), _ids("b d")), (_ids("a"), _ids("d"))])
    assert left.lengths.tolist() == other.lengths.tolist()
    assert left.fingerprint() == copy.fingerprint() != other.fingerprint()  # wherever the files lie


def test_broken_document_names_file_and_token(tmp_path):
    dataset = write_documents(tmp_path / "bad", [(_ids("a"), _ids("b")), (_ids("a"), _ids("b </Path>"))])
    with pytest.raises(DataError, match=r"bad document 1: stray_tag at token 2: .* make the files again"):
        dataset[1]


def test_broken_document_is_plain_text_on_request(tmp_path):
    """All of the table, its last closing tag missing: causal, no structure for the scan, the response still trained."""
    ids = _ids(" ".join(row[0] for row in ROWS))[:-3]
    write_documents(tmp_path / "bad", [(ids[:1], ids[1:]), (_ids("a"), _ids("b c"))])
    dataset = SFTDataset(str(tmp_path / "bad"), VOCAB, malformed="causal")
    n = len(ids)
    assert "bad document 0: unclosed" in str(dataset[0].problem) and dataset[1].problem is None
    arrays = pack_arrays([dataset[0], dataset[1]], n + 4, PAD)
    assert arrays["position_ids"].tolist() == [*range(n), 0, 1, 2, 0]
    assert arrays["r"].tolist()[:n] == [*range(4, n + 4)]
    assert arrays["documents"].tolist() == [[0, n], [n, n + 1], [n + 3, n + 4]]
    assert arrays["malformed"].tolist() == [True, False, False]
    assert arrays["loss_mask"].tolist() == [1.0] * (n - 1) + [0.0] + [1.0, 1.0, 0.0, 0.0]


def test_broken_document_is_dropped_on_request(tmp_path):
    """Nothing of it is trained, the documents beside it are as before, and it keeps its number and its place."""
    broken = (_ids("a"), _ids("b </Path>"))
    write_documents(tmp_path / "bad", [(_ids("a"), _ids("b c")), broken, (_ids("a"), _ids("d"))])
    dataset = SFTDataset(str(tmp_path / "bad"), VOCAB, malformed="drop")
    assert "bad document 1: stray_tag" in str(dataset[1].problem)
    arrays = pack_arrays([dataset[k] for k in range(3)], 9, PAD)
    assert arrays["loss_mask"].tolist() == [1.0, 1.0, 0.0, *[0.0] * 3, 1.0, 0.0, 0.0]
    assert arrays["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0]
    assert arrays["malformed"].tolist() == [False, True, False, False]
    assert arrays["documents"].tolist() == [[0, 1], [3, 6], [6, 7], [8, 9]]


def test_blocks_nested_deeper_than_eight_are_broken(tmp_path):
    rng = random.Random(0)
    for depth in (8, 9):
        response = np.array(write(rng, deep_tags(depth)), dtype=np.int64)
        dataset = write_documents(tmp_path / str(depth), [(response[:0], response)], TREES)
        if depth == 8:
            assert dataset[0].problem is None
            continue
        with pytest.raises(DataError, match="at most 8 nested blocks"):
            dataset[0]


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with pytest.raises(DataError, match=r"preprocess_data\.py --output-prefix"):
        SFTDataset(str(tmp_path / "none"), VOCAB)
    with pytest.raises(DataError, match=r"several prefixes, .*; else make it with .* --output-prefix '.*/my set'"):
        SFTDataset(str(tmp_path / "my set"), VOCAB)
    with pytest.raises(DataError, match="is empty"):
        write_documents(tmp_path / "empty", [])
    builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"))
    builder.add_item(torch.IntTensor([1, 2]))
    builder.end_document()
    builder.finalize(str(tmp_path / "other.idx"))
    with pytest.raises(DataError, match="two sequences"):
        SFTDataset(str(tmp_path / "other"), VOCAB)


def test_a_file_that_is_cut_off_while_it_is_read_is_no_bus_error(tmp_path):
    """In a process of its own, which a bus error would end. A cut .bin is an error; the .idx is not read again."""
    many = [(np.full(4000, PIECES.index("a")), _ids("d end"))] * 20
    write_documents(tmp_path / "other", [(_ids("a"), _ids("b c end"))] * 3)
    write_documents(tmp_path / "set", [(_ids("a b"), _ids("c end")), *many])
    code = f"""
import os
from pathlib import Path
from megatron_multiverse.data.sft_dataset import SFTDataset
from megatron_multiverse.errors import DataError
from tests.unit.data.test_sft_dataset import VOCAB

data = SFTDataset([{str(tmp_path / "other")!r}, {str(tmp_path / "set")!r}], VOCAB)
file = Path({str(tmp_path / "set.bin")!r})
os.truncate(file.with_suffix(".idx"), 0)
last, whole = len(data) - 1, file.read_bytes()
os.replace(file, file.with_suffix(".old"))
file.write_bytes(b"")  # another file of the name: what was opened is whole
assert len(data[last].ids) == 4002
os.truncate(file.with_suffix(".old"), 8)
for read in (data.__getitem__, data.prompt, data.last_token):
    try:
        read(last)
    except DataError as error:
        print(error)
file.with_suffix(".old").write_bytes(whole)
print(len(data[last].ids), data.prompt(3), data.last_token(3))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    *told, read = done.stdout.splitlines()
    assert len(told) == 3 and read == f"4002 {_ids('a b').tolist()} {PIECES.index('end')}"
    assert all(
        re.match(r".*set\.bin was cut off as it was read: it has 8 bytes, and had \d+; make", line) for line in told
    )
