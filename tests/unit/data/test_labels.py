"""One verdict on labels: by the text alone, and by the tokens of any tokenizer."""

from __future__ import annotations

import json

import pytest

from megatron_multiverse.data.preprocess import PreprocessConfig, preprocess_data
from megatron_multiverse.data.responses import ResponseReader
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.data.turns import RowError
from megatron_multiverse.errors import StructureError
from megatron_multiverse.structure import Event, StructureMachine, check_text, parse, parse_text
from tests.unit.data.conftest import GLUED, TRAJECTORY

LABELS = {
    **{f"1:{tail}": True for tail in GLUED},
    "1:  x": True, "1: x": True, "1:x": True, "1:1": True, "1:é": True, "1:</": True, "1:1: x": True, "1:.": True,
    "1": False, "1 :": False, " 1:": False, "\n1:": False, "\r\n1:": False, ":": False, ".1:": False, "x1:": False,
    "1.:": False, "01:": False, "2:": False, "1.1:": False, "1::": True, "": False, "1;": False,
}  # fmt: skip


def text_with(outline: str, path: str) -> str:
    return (
        f"<Parallel>\n<Goal>\n<Outline>\n{outline}\n</Outline>\n</Goal>\n<Path>\n{path}\n</Path>\n"
        "<Conclusion>\nc\n</Conclusion>\n</Parallel>"
    )


@pytest.fixture(scope="module", params=["glued_folder", "hf_folder", "sentencepiece_file"])
def any_tokenizer(request: pytest.FixtureRequest) -> MultiverseTokenizer:
    kind = "SentencePieceTokenizer" if request.param == "sentencepiece_file" else "HuggingFaceTokenizer"
    return build_tokenizer(kind, request.getfixturevalue(request.param))


def by_text(text: str) -> str | None:
    try:
        check_text(text)
    except StructureError as error:
        return error.code
    parse_text(text)  # what is accepted can be read
    return None


def by_tokens(tokenizer: MultiverseTokenizer, text: str) -> str | None:
    try:
        read = ResponseReader(tokenizer).read(text, tokenizer.tokenize(text))
    except RowError as error:
        return error.code
    assert tokenizer.detokenize(read.ids.tolist()) == text
    return None


@pytest.mark.parametrize("label", LABELS)
def test_text_and_tokens_agree(any_tokenizer, label):
    for text in (text_with(label, "1: x"), text_with("1: x", label), text_with(label, label)):
        expected = by_text(text)
        assert (expected is None) == LABELS[label]
        assert by_tokens(any_tokenizer, text) == expected


def test_the_fixture_glues(glued_folder):
    """Else the tests above would prove nothing."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", glued_folder)
    for tail in GLUED:
        first = tokenizer.tokenize(f"1:{tail}")[1]
        assert tokenizer.id_to_text[first].startswith(":") and len(tokenizer.id_to_text[first]) > 1


def test_every_path_begins_with_the_tokens_that_the_engine_writes(glued_folder):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", glued_folder)
    vocab = tokenizer.structure_vocab
    forced = tokenizer.tokenize("1:")
    for tail in GLUED:
        text = text_with(f"1:{tail}", f"1:{tail}")
        read = ResponseReader(tokenizer).read(text, tokenizer.tokenize(text))
        (path,) = parse(read.ids, vocab).blocks[0].paths
        assert read.ids[path.start : path.forced_end].tolist() == vocab.path_prefix(forced)


def test_rows_without_glued_labels_keep_their_tokens(any_tokenizer):
    ids = any_tokenizer.tokenize(TRAJECTORY)
    assert ResponseReader(any_tokenizer).read(TRAJECTORY, ids).ids.tolist() == ids
    assert any_tokenizer.tokenize_response(TRAJECTORY) == ids


@pytest.mark.parametrize("tail", GLUED)
def test_an_answer_of_the_engine_preprocesses(tmp_path, glued_folder, tail):
    """A model announces glued labels, the engine forks and writes the label, and the path goes on glued again."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", glued_folder)
    vocab = tokenizer.structure_vocab
    root = StructureMachine(vocab)
    answer = tokenizer.tokenize(f"<Parallel>\n<Goal>\n<Outline>\n1:{tail}a\n</Outline>\n</Goal>")
    assert [root.push(token) for token in answer][-1] is Event.FORK
    path = root.fork(0)
    (outline,) = root.outlines
    branch = vocab.path_prefix(outline.label_ids) + tokenizer.tokenize(f"{tail}b\n</Path>")
    assert [path.push(token) for token in branch][-1] is Event.PATH_END
    root.join()
    rest = vocab.conclusion_prefix() + tokenizer.tokenize("\nc\n</Conclusion>\n</Parallel>")
    for token in rest:
        root.push(token)
    root.finish()
    assert not root.malformed and not path.malformed
    response = tokenizer.detokenize([*answer, *branch, *rest])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "response": response}) + "\n")
    config = PreprocessConfig(
        input=str(tmp_path / "rows.jsonl"),
        output_prefix=str(tmp_path / "out"),
        tokenizer_model=str(glued_folder),
        workers=1,
    )
    result = preprocess_data(config)
    assert (result.totals.documents, result.totals.rejected.total()) == (1, 0)
