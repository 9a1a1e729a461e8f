"""Tokenizers: tags and newlines are single tokens, decoding is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_multiverse.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, build_tokenizer
from megatron_multiverse.errors import ConfigError
from megatron_multiverse.structure import TAGS, parse
from tests.unit.data.conftest import TRAJECTORY, train_sentencepiece


@pytest.mark.parametrize("around", ["{}", "a{}b", " {} ", "  {}x", "x {}", "{} x", "1:{}1:"])
def test_tag_is_one_token_and_text_around_it_stays(tokenizer, around):
    vocab = tokenizer.structure_vocab
    for tag, token in zip([*TAGS, "\n"], [*vocab.tag_ids, vocab.newline_id], strict=True):
        text = around.format(tag)
        ids = tokenizer.tokenize(text)
        assert ids.count(token) == 1
        assert tokenizer.detokenize(ids) == text


def test_trajectory_decodes_exactly_and_parses(tokenizer):
    ids = tokenizer.tokenize(TRAJECTORY)
    assert tokenizer.detokenize(ids) == TRAJECTORY
    assert len(list(parse(ids, tokenizer.structure_vocab).walk())) == 2


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_any_text_decodes_exactly(kind, hf_folder, sentencepiece_file):
    tokenizer = HuggingFaceTokenizer(hf_folder) if kind == "hf" else SentencePieceTokenizer(sentencepiece_file)
    # sentencepiece writes a blank as U+2581 and cannot tell the two apart; NUL ends its strings.
    characters = st.characters(codec="utf-8", exclude_characters="\u2581\0")

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from([*TAGS, "\n", " ", "  "]), st.text(characters, max_size=8)), max_size=8))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text

    check()


def test_batch_equals_one_by_one(tokenizer):
    texts = ["", "a", TRAJECTORY, " b \n"]
    assert tokenizer.tokenize_batch(texts) == [tokenizer.tokenize(text) for text in texts]


def test_id_to_text_joins_to_the_text(tokenizer):
    text = "1: x < y\n 2.1: é"
    joined = "".join(tokenizer.id_to_text[token] for token in tokenizer.tokenize(text[:-1]))
    assert joined == text[:-1]
    assert tokenizer.id_to_text[tokenizer.structure_vocab.newline_id] == "\n"


def test_sizes_and_special_ids(tokenizer):
    assert tokenizer.vocab_size == max(tokenizer.structure_vocab.tag_ids) + 1
    assert tokenizer.structure_vocab.eos_id == tokenizer.eod
    assert tokenizer.pad != tokenizer.structure_vocab.newline_id


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = build_tokenizer(type(tokenizer).__name__, tmp_path)
    assert loaded.id_to_text == tokenizer.id_to_text
    assert loaded.tokenize(TRAJECTORY) == tokenizer.tokenize(TRAJECTORY)
    assert (loaded.eod, loaded.pad) == (tokenizer.eod, tokenizer.pad)


def test_tags_follow_the_vocabulary_in_official_order(hf_folder):
    tags = HuggingFaceTokenizer(hf_folder).structure_vocab.tag_ids
    assert list(tags) == list(range(tags[0], tags[0] + 12))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_without_newline_gets_one(tmp_path, model_type):
    # The default normalization turns a newline into a blank.
    options = {"normalization_rule_name": "nmt_nfkc", "byte_fallback": False, "vocab_size": 75}
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path, model_type, **options))
    text = "One plus two\nis\n\nthree <Path>\n1:"
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_sentencepiece_tags_as_control_symbols_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="control symbol"):
        SentencePieceTokenizer(train_sentencepiece(tmp_path, control_symbols=list(TAGS), vocab_size=352))


def test_sentencepiece_turn_tokens_are_control_tokens_and_other_symbols_are_not(tmp_path):
    symbols = ["<|im_end|>", "<start_of_turn>", "[INST]", "<table>", "\n\n"]
    file = train_sentencepiece(tmp_path, user_defined_symbols=symbols, vocab_size=352)
    tokenizer = SentencePieceTokenizer(file)
    assert sorted(tokenizer.control_tokens.values()) == sorted(symbols[:3])
    assert all(tokenizer.tokenize(text) == [token] for token, text in tokenizer.control_tokens.items())


def test_sentencepiece_tags_already_there_keep_their_ids(tmp_path):
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path, user_defined_symbols=list(TAGS), vocab_size=352))
    assert tokenizer.vocab_size == 352
    assert tokenizer.structure_vocab.tag_ids == tuple(range(3, 15))


def test_tokenizer_that_loses_newlines_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="each newline as one token"):
        HuggingFaceTokenizer(tmp_path)


def test_tag_that_swallows_blanks_is_refused(tmp_path, hf_folder):
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<Path>", special=True, lstrip=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="swallows blanks"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("mapped", ["<|pad|>", {"content": "<|pad|>", "lstrip": False}])
def test_special_tokens_map_counts_as_in_transformers(tmp_path, hf_folder, table, mapped):
    """It overrides the config, unless that has a table of added tokens."""
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    config = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    added = {"added_tokens_decoder": {"0": {"content": "<|end|>", "special": True}}} if table else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | added))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": mapped}))
    ours, theirs = HuggingFaceTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eod == theirs.eos_token_id == (0 if table else 1)
    (tmp_path / "special_tokens_map.json").write_text("[1")
    if not table:
        with pytest.raises(ConfigError, match=r"special_tokens_map\.json is damaged"):
            HuggingFaceTokenizer(tmp_path)


def test_chat_template_wraps_the_user_turn(hf_folder, tmp_path):
    tokenizer = HuggingFaceTokenizer(hf_folder)
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.render_chat("hi")
    tokenizer.save(tmp_path)
    template = "{{ eos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    (tmp_path / "chat_template.jinja").write_text(template)
    loaded = HuggingFaceTokenizer(tmp_path)
    assert loaded.render_chat("hi") == "<|end|>[user]hi[assistant]"
    assert loaded.fingerprint() != tokenizer.fingerprint()
    named = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": "d"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert HuggingFaceTokenizer(tmp_path).render_chat("hi") == "d"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GPT2BPETokenizer", "must be one of"),
        ("SentencePieceTokenizer", "no sentencepiece model"),
        ("HuggingFaceTokenizer", "no Hugging Face tokenizer"),
    ],
)
def test_bad_choice_says_what_is_wrong(kind, message, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(kind, tmp_path / "missing")


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_a_tokenizer_that_nobody_named_is_asked_for(kind, hf_folder, monkeypatch):
    monkeypatch.chdir(hf_folder)  # "" is a name of this folder for a Path, which would be taken without a word
    with pytest.raises(ConfigError, match=r"^tokenizer_model is empty: name the tokenizer"):
        build_tokenizer(kind, "")


def test_the_folder_that_one_is_in_is_a_tokenizer(hf_folder, monkeypatch):
    monkeypatch.chdir(hf_folder)
    here = build_tokenizer("HuggingFaceTokenizer", ".")
    assert here.fingerprint() == build_tokenizer("HuggingFaceTokenizer", hf_folder).fingerprint()


def test_folder_without_tokenizer_json_goes_through_transformers(hf_folder, tmp_path):
    from tokenizers import Tokenizer

    Tokenizer.from_file(str(hf_folder / "tokenizer.json")).model.save(str(tmp_path))  # vocab.json and merges.txt
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"} | special))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    direct, converted = HuggingFaceTokenizer(hf_folder), HuggingFaceTokenizer(tmp_path)
    assert converted.tokenize(TRAJECTORY) == direct.tokenize(TRAJECTORY)
    assert (converted.eod, converted.vocab_size) == (direct.eod, direct.vocab_size)


def _with_bytes_for_unknown_characters(folder: Path) -> HuggingFaceTokenizer:
    """A tokenizer as Llama 2 has: blanks are U+2581, the first one of a text is dropped, other characters are bytes."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {piece: k for k, piece in enumerate(["<unk>", *(f"<0x{k:02X}>" for k in range(256)), "a", "\u2581", "\n"])}
    backend = Tokenizer(models.BPE(vocab | {"\u2581a": len(vocab)}, [("\u2581", "a")], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("kind", ["bytes", "blanks"])
def test_all_ids_decoded_at_once_are_those_decoded_one_by_one(kind, tmp_path, hf_folder):
    tokenizer = HuggingFaceTokenizer(hf_folder) if kind == "bytes" else _with_bytes_for_unknown_characters(tmp_path)
    anchor = tokenizer.structure_vocab.tag_ids[0]
    assert tokenizer.id_to_text == [
        tokenizer.detokenize([anchor, token]).removeprefix(TAGS[0]) for token in range(tokenizer.vocab_size)
    ]
    assert " a" in tokenizer.id_to_text


def _with_gap(folder: Path, hf_folder: Path, gap: int) -> Path:
    """The tokenizer with one more token, whose id lies `gap` after the last one."""
    content = json.loads((hf_folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = max(content["model"]["vocab"].values()) + gap
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_ids_that_no_token_has_are_empty_texts(tmp_path, hf_folder):
    tokenizer = HuggingFaceTokenizer(_with_gap(tmp_path, hf_folder, 40))
    texts = tokenizer.id_to_text
    assert len(texts) == 1 + texts.index("far")
    assert [texts.index(tag) for tag in TAGS] == [tokenizer._backend.token_to_id(tag) for tag in TAGS]
    assert texts[-20:-1] == [""] * 19


def test_tags_never_share_an_id_with_another_token(tmp_path, hf_folder):
    """The tokenizers library counts tokens to find the next id, which a vocabulary with gaps may have given away."""
    with pytest.raises(ConfigError, match=r"gaps between its ids.* far"):
        HuggingFaceTokenizer(_with_gap(tmp_path, hf_folder, 10))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", POINTER, "git-lfs pointer"),
        ("tokenizer.json", b'{"version": "1.0", "mod', "damaged or no tokenizer.json"),
        ("tokenizer_config.json", POINTER, "git-lfs pointer"),
        ("tokenizer_config.json", b'{"eos_token": ', "is damaged"),
        ("tokenizer_config.json", b"[]", "holds a list, not an object"),
        ("tokenizer_config.json", b"\xff", "not UTF-8"),
        ("chat_template.jinja", POINTER, "git-lfs pointer"),
    ],
)
def test_damaged_files_of_a_tokenizer_are_named(tmp_path, hf_folder, name, content, message):
    HuggingFaceTokenizer(hf_folder).save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}.*{message}"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(POINTER, "git-lfs pointer"), (b"\x0a\x05xx", "damaged or no")])
def test_a_damaged_sentencepiece_model_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"tokenizer\.model.*{message}"):
        SentencePieceTokenizer(tmp_path)


def test_a_folder_above_and_a_file_beside_a_tokenizer_lead_to_it(hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "model")
    inner = tmp_path / "model"
    with pytest.raises(ConfigError, match=f"^no Hugging Face tokenizer at {tmp_path}, a folder .*: {inner} has one$"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)
    file = inner / "config.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=f"^{file} is no tokenizer: give its folder, {inner}$"):
        build_tokenizer("HuggingFaceTokenizer", file)


def test_a_folder_with_a_sentencepiece_model_alone_names_the_option(tmp_path, sentencepiece_file):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    with pytest.raises(ConfigError, match="use --tokenizer-type SentencePieceTokenizer"):
        HuggingFaceTokenizer(tmp_path)


def test_control_tokens_are_the_special_ones_less_the_tags(hf_folder, glued_folder, sentencepiece_file):
    assert set(HuggingFaceTokenizer(hf_folder).control_tokens.values()) == {"<|end|>", "<|pad|>"}
    chat = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert set(HuggingFaceTokenizer(glued_folder).control_tokens.values()) == chat
    # sentencepiece never reads a control symbol out of a text.
    tokenizer = SentencePieceTokenizer(sentencepiece_file)
    assert tokenizer.eod not in tokenizer.tokenize("a </s> b") and not tokenizer.control_tokens


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD", None])
@pytest.mark.parametrize("text", ["plain", "e\u0301", "\u00e9", "x\u00b2", "\uff11"])
def test_texts_that_a_normalizer_changes_are_told(tmp_path, glued_folder, form, text):
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(glued_folder / "tokenizer.json"))
    if form:
        backend.normalizer = getattr(normalizers, form)()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    ids = tokenizer.tokenize(text)
    assert tokenizer.keeps(text, ids) == (tokenizer.detokenize(ids) == text)


def test_texts_that_another_tokenizer_changes_are_told(tmp_path, hf_folder):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    backend = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    changes = {
        "lower": ("normalizer", normalizers.Lowercase()),
        "prefix": ("pre_tokenizer", pre_tokenizers.ByteLevel()),
    }
    for name, (attribute, value) in changes.items():
        changed = Tokenizer.from_str(backend.to_str())
        setattr(changed, attribute, value)
        (tmp_path / name).mkdir()
        changed.save(str(tmp_path / name / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "lower")
    assert not tokenizer.keeps("ABC", tokenizer.tokenize("ABC")) and tokenizer.keeps("abc", tokenizer.tokenize("abc"))
