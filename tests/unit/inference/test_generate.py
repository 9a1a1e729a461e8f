"""The command line: prompts in, text or JSON out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from jinja2 import TemplateError

from megatron_multiverse.config import EngineConfig, SamplingParams
from megatron_multiverse.data.tokenizers import MultiverseTokenizer, build_tokenizer
from megatron_multiverse.errors import CheckpointError, ConfigError, DataError, GenerationError
from megatron_multiverse.inference import Request, from_record, generate
from megatron_multiverse.inference.conversation import cut_at_answers, render_prompt
from megatron_multiverse.inference.generate import GenerateConfig, generate_answers, write_answers
from megatron_multiverse.structure import Tag
from megatron_multiverse.views.terminal_answers import show_answers
from tests.forked import run_forked
from tests.in_process import run_here

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples" / "quickstart" / "model"
LONG = SamplingParams(max_tokens=600)
PROMPT = "Work out A = 914 * 2; B = 1849 + 24. Think step by step and in parallel before answering.\n"


def test_parallel_and_sequential_answers_are_the_same_text():
    options = {"load": MODEL, "prompt": PROMPT, "sampling": LONG, "device": "cpu"}
    parallel = next(generate_answers(GenerateConfig(**options)))
    sequential = next(generate_answers(GenerateConfig(**options, sequential=True, engine=EngineConfig(page_size=1))))
    assert parallel["text"] == sequential["text"]
    assert parallel["prompt"] == PROMPT
    assert parallel["tokens"] <= 600
    assert parallel["text"].count("<Path>") == sum(len(block["branches"]) for block in parallel["blocks"])
    if parallel["blocks"]:
        assert parallel["decode_steps"] < sequential["decode_steps"]
        assert parallel["num_parallel"] > 1


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_the_tool_reads_and_writes_jsonl(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": PROMPT}, {"prompt": "Line\u2028separators are\x85text"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    options = ["--load", MODEL, "--sampling.max-tokens", "20"]
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    done = run_here(monkeypatch, capsys, "tools/generate.py", *options, *files, "--sequential")
    assert done.returncode == 0, done.stderr
    answers = sorted(read(tmp_path / "out.jsonl"), key=lambda answer: answer["index"])
    assert [{"prompt": answer["prompt"]} for answer in answers] == rows
    assert all(answer["tokens"] <= 20 for answer in answers)
    command = [ROOT / "tools" / "generate.py", *options, "--prompt", "a", "--engine.num-pages", "1"]
    refused = run_forked(*command, cwd=ROOT)
    assert refused.returncode == 1
    assert "cache slots" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("prompts", [{}, {"prompt": "a", "input": Path("b.jsonl")}])
def test_exactly_one_source_of_prompts(prompts):
    with pytest.raises(GenerationError, match="give either --prompt TEXT or --input"):
        next(generate_answers(GenerateConfig(load=MODEL, **prompts)))


def test_rows_that_cannot_be_answered_say_why_and_the_others_are_answered(tmp_path):
    long = json.dumps({"prompt": "a " * 5000})
    lines = ['{"prompt": "a"}', '{"question": "b"}', "no json", "", "[1]", long, '{"prompt": 7}', '{"prompt": "b"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    config = GenerateConfig(
        load=MODEL, input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", sampling=SamplingParams(max_tokens=5)
    )
    assert write_answers(config) == (2, 5)
    rows = {row["index"]: row for row in read(tmp_path / "out.jsonl")}
    assert [k for k in range(7) if "text" in rows[k]] == [0, 6]
    for index, message in {1: "row 2", 2: "row 3", 3: "row 5", 4: "positions of the model", 5: "row 7"}.items():
        assert rows[index]["finish_reason"] == "error"
        assert message in rows[index]["error"]
    assert "question" in rows[1]["error"]


def test_an_answer_that_breaks_the_grammar_fails_where_asked(tmp_path):
    bias = {build_tokenizer("HuggingFaceTokenizer", MODEL).structure_vocab.tag_ids[Tag.END_PATH]: 100.0}
    sampling = SamplingParams(max_tokens=5, on_malformed="error", logit_bias=bias)
    config = GenerateConfig(load=MODEL, prompt=PROMPT, output=tmp_path / "out.jsonl", sampling=sampling)
    assert write_answers(config) == (0, 1)
    (row,) = read(tmp_path / "out.jsonl")
    assert row["finish_reason"] == "error" and row["text"] == "</Path>" and "found </Path>, expected" in row["error"]
    assert show_answers(replace(config, output=None)) == 1


def test_rows_are_written_as_they_finish(tmp_path):
    """Short answers do not wait for long ones, and an interrupted run keeps what it has."""
    prompts = [PROMPT.replace("1849 + 24", "(48 + 76) - (13 * 4); C = 583 + 967"), PROMPT]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = GenerateConfig(load=MODEL, input=tmp_path / "in.jsonl", sampling=LONG)
    first, second = generate_answers(config)
    assert first["prompt"] == prompts[first["index"]]
    assert (first["index"], second["index"]) == (1, 0)
    assert first["decode_steps"] < second["decode_steps"]
    out = tmp_path / "out.jsonl"
    seen = []

    class Interrupted(Exception):
        pass

    def rows_then_interrupt(config):
        yield first
        seen.append(out.read_text())
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_multiverse.inference.generate.generate_answers", rows_then_interrupt)
        with pytest.raises(Interrupted):
            write_answers(replace(config, output=out))
    assert json.loads(seen[0])["text"] == first["text"]


def test_an_output_that_cannot_be_written_shows_before_the_model_is_loaded(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    nowhere = GenerateConfig(load=tmp_path / "no model", prompt="a", output=tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(FileNotFoundError, match=r"out\.jsonl"):
        write_answers(nowhere)


@pytest.mark.parametrize(("first", "second"), [("input", "output"), ("input", "records"), ("output", "records")])
def test_no_file_is_named_twice(tmp_path, first, second):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    asked = {} if "input" in (first, second) else {"prompt": "a"}
    files = {"output": tmp_path / "out.jsonl", first: rows, second: rows} | asked
    with pytest.raises(GenerationError, match=f"--{second} .* is the file of --{first}, too"):
        write_answers(GenerateConfig(load=MODEL, **files))
    assert rows.read_text() == '{"prompt": "a"}\n'


def test_earlier_answers_stand_until_the_first_new_one(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("the work of hours\n")
    with pytest.raises(CheckpointError, match="no such folder"):
        write_answers(GenerateConfig(load=tmp_path / "no model", prompt="a", output=out))
    assert out.read_text() == "the work of hours\n"
    config = GenerateConfig(load=MODEL, prompt="a", output=out, sampling=SamplingParams(max_tokens=4))
    assert write_answers(config) == (1, 0)
    assert len(out.read_text().splitlines()) == 1 and json.loads(out.read_text())["index"] == 0


def test_an_input_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        next(generate_answers(GenerateConfig(load=MODEL, input=tmp_path / "nope.jsonl")))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        next(generate_answers(GenerateConfig(load=MODEL, input=tmp_path / "empty.jsonl")))


def test_several_samples_of_a_prompt_differ_and_repeat():
    options = {
        "load": MODEL,
        "prompt": PROMPT,
        "sampling": SamplingParams(max_tokens=40, temperature=3.0, n=3),
    }
    texts = {row["sample"]: row["text"] for row in generate_answers(GenerateConfig(**options))}
    assert sorted(texts) == [0, 1, 2]
    assert len(set(texts.values())) == 3
    again = generate_answers(GenerateConfig(**options, engine=EngineConfig(prefix_cache=False, page_size=4)))
    assert {row["sample"]: row["text"] for row in again} == texts


def test_limits_and_stop_tokens_reach_the_engine():
    options = {"load": MODEL, "prompt": PROMPT, "sampling": LONG}
    free = next(generate_answers(GenerateConfig(**options)))
    assert free["blocks"]
    assert next(generate_answers(GenerateConfig(**options, engine=EngineConfig(max_depth=0))))["blocks"] == []
    assert (
        next(generate_answers(GenerateConfig(**options, engine=EngineConfig(max_paths=1))))["malformed"][
            "too_many_paths"
        ]
        >= 1
    )
    stop = free["text"][7:17]
    assert len(build_tokenizer("HuggingFaceTokenizer", MODEL).tokenize(stop)) > 1
    stopped = next(
        generate_answers(GenerateConfig(**options | {"sampling": replace(LONG, stop=("no such text", stop))}))
    )
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert stopped["text"].startswith(free["text"][: free["text"].index(stop)])
    assert stop not in stopped["text"]
    assert (
        next(generate_answers(GenerateConfig(**options | {"sampling": replace(LONG, ignore_eos=True)})))[
            "finish_reason"
        ]
        == "length"
    )


def test_live_hears_one_answer_and_records_are_written(tmp_path: Path) -> None:
    heard: dict[str, list[int]] = {}
    config = GenerateConfig(load=MODEL, prompt=PROMPT, sampling=LONG, live=True, records=tmp_path / "records.jsonl")

    def watch(tokenizer, prompt):
        assert prompt == PROMPT
        return lambda request, branch, ids: heard.setdefault(branch, []).extend(ids)

    (row,) = generate_answers(config, watch=watch)
    (record,) = read(tmp_path / "records.jsonl")
    assert sorted(token for ids in heard.values() for token in ids) == sorted(record["token_ids"])
    assert from_record(record).finish_reason == row["finish_reason"]
    several = replace(config, sampling=SamplingParams(n=2, temperature=1.0))
    with pytest.raises(GenerationError, match="--live shows one answer"):
        next(generate_answers(several, watch=watch))


def test_structure_tags_do_not_stop_answers() -> None:
    goal = (build_tokenizer("HuggingFaceTokenizer", MODEL).structure_vocab.tag_ids[Tag.END_GOAL],)
    with pytest.raises(GenerationError, match="structure tag </Goal>"):
        next(generate_answers(GenerateConfig(load=MODEL, prompt=PROMPT, sampling=SamplingParams(stop_token_ids=goal))))


def test_a_tokenizer_of_another_model_is_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    """Both where the model folder has its own tokenizer, and where only the rows of the model can tell."""
    other = GenerateConfig(load=MODEL, prompt=PROMPT, tokenizer_model=str(qwen3_folder))
    with pytest.raises(ConfigError, match="gives id 256 another text than the one in"):
        next(generate_answers(other))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path / name)
    with pytest.raises(GenerationError, match=r"has 1516\d\d ids, the model \d+ rows"):
        next(generate_answers(replace(other, load=tmp_path)))


def test_a_missing_model_and_a_missing_chat_template_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--load .*nowhere: no such folder"):
        next(generate_answers(GenerateConfig(load=tmp_path / "nowhere", prompt="a")))
    with pytest.raises(GenerationError, match="leave --chat out"):
        next(generate_answers(GenerateConfig(load=MODEL, prompt="a", chat=True)))


def test_a_chat_template_writes_the_date_of_preprocessing_or_the_one_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    asked: list[list[int]] = []

    def request(*, prompt_ids: list[int], **options: object) -> Request:
        asked.append(prompt_ids)
        return Request(prompt_ids=prompt_ids, **options)

    monkeypatch.setattr(generate, "Request", request)
    for given in ({}, {"template_date": "2026-01-31"}):
        options = {"load": model, "prompt": "a", "chat": True, "sampling": SamplingParams(max_tokens=1)}
        next(generate_answers(GenerateConfig(**options, **given)))
    detokenize = build_tokenizer("HuggingFaceTokenizer", str(model)).detokenize
    assert [detokenize(ids) for ids in asked] == ["2024-07-26 a", "2026-01-31 a"]
    with pytest.raises(ConfigError, match=r"template_date \(today\) must be a date"):
        GenerateConfig(load=model, prompt="a", chat=True, template_date="today")
    with pytest.raises(GenerationError, match="--template-date has no effect without --chat"):
        GenerateConfig(load=model, prompt="a", template_date="2026-01-31")


EARLIER = """<Parallel>
<Goal>
<Outline>
1: A = 1 + 2
</Outline>
<Outline>
2: B = 3 + 4
</Outline>
</Goal>
<Path>
1: A = 3
</Path>
<Path>
2: B = 7
</Path>
<Conclusion>
A = 3; B = 7
</Conclusion>
</Parallel>"""


def test_blocks_of_a_thought_apart_are_not_read_as_text_without_a_word() -> None:
    """Templates that show no thoughts of earlier turns, as Qwen3's, have nothing to lay out."""
    user = {"role": "user", "content": "Why?"}
    turns = [user, {"role": "assistant", "content": "So.", "reasoning_content": f"\n{EARLIER}\n"}, user]
    with pytest.raises(GenerationError, match="blocks of a reasoning_content are not laid out again; give the thought"):
        cut_at_answers(f"Why?\n<Think>\n{EARLIER}\n</Think>\nSo.\nWhy?\n", turns)
    pieces, answers = cut_at_answers("Why?\nSo.\nWhy?\n", turns)
    assert "".join(pieces[slice(*answers[0])]) == "So."


def test_conversations_are_answered_and_their_answers_laid_out_again(tmp_path: Path) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    user = {"role": "user", "content": "Work out A = 5 + 6."}
    turns = [user, {"role": "assistant", "content": EARLIER}, user]
    rows = [{"messages": turns}, {"messages": turns[:2]}, {"messages": [{"role": "user"}]}, {"prompt": "a"}]
    rows.append({"messages": turns, "tools": [{"type": "function", "function": {"name": "add"}}]})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"load": model, "input": tmp_path / "in.jsonl", "sampling": SamplingParams(max_tokens=4)}
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(model))
    prompts = []
    for replay in (False, True):
        config = GenerateConfig(**options, chat=True, replay_structure=replay, records=tmp_path / "records.jsonl")
        answers = {answer["index"]: answer for answer in generate_answers(config)}
        assert answers[0]["messages"] == turns and answers[3]["prompt"] == "a"
        assert 'row 2: "messages" must end' in answers[1]["error"] and "row 3: turn 1 of" in answers[2]["error"]
        assert "row 5: column 'tools' is not read" in answers[4]["error"]
        records = [record for record in read(tmp_path / "records.jsonl") if record["index"] == 0]
        result = from_record({name: value for name, value in records[0].items() if name != "index"})
        # The shorter of the two paths takes no positions of its own.
        assert (result.position_ids[0] < len(result.prompt_ids)) is replay
        prompts.append(tokenizer.detokenize(result.prompt_ids))
    assert prompts == [f"{user['content']}\n{EARLIER}\n{user['content']}\n"] * 2
    without = {answer["index"]: answer for answer in generate_answers(GenerateConfig(**options))}
    assert "add --chat" in without[0]["error"] and without[3]["finish_reason"] == "length"
    with pytest.raises(GenerationError, match="--replay-structure is of conversations"):
        GenerateConfig(**options, replay_structure=True)


class StrictTemplate:
    """In place of a tokenizer: its chat template takes a tool's result after a call alone."""

    def render_chat(self, turns: list[dict[str, Any]], *, date: object) -> str:
        if any(turn["role"] == "tool" and "tool_calls" not in before for before, turn in pairwise(turns)):
            raise TemplateError("a result without a call")
        return json.dumps(turns)


def test_a_conversation_that_ends_with_the_result_of_a_tool_is_rendered() -> None:
    """Its suffix follows what the user asked."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    called = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    tokenizer = cast(MultiverseTokenizer, StrictTemplate())
    turns = [{"role": "user", "content": "1 + 2?"}, *called]
    rendered = render_prompt(turns, tokenizer, suffix=" Think.", date=None, replay=False)
    assert rendered == ([json.dumps([{"role": "user", "content": "1 + 2? Think."}, *called])], [])


def test_the_training_suffix_is_put_behind_the_prompt() -> None:
    text, suffix = PROMPT[: PROMPT.index(" Think step")], " Think step by step and in parallel before answering."
    options = {"load": MODEL, "sampling": SamplingParams(max_tokens=20)}
    written = next(generate_answers(GenerateConfig(**options, prompt=text + suffix)))
    added = next(generate_answers(GenerateConfig(**options, prompt=text, prompt_suffix="parallel")))
    assert added["text"] == written["text"]
    assert added["prompt"] == text


def test_all_ends_of_generation_config_end_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    newline = tokenizer.structure_vocab.newline_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eod, newline]}))
    config = GenerateConfig(load=folder, prompt=PROMPT, sampling=LONG)
    with caplog.at_level("INFO"):
        answer = next(generate_answers(config))
    assert answer["finish_reason"] == "stop"
    assert "\n" not in answer["text"]
    assert f"answers end at: {tokenizer.id_to_text[tokenizer.eod]}, \n" in caplog.text
    for bad in ("{", "[]", '{"eos_token_id": 99999999}', '{"eos_token_id": [true]}'):
        (folder / "generation_config.json").write_text(bad)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            next(generate_answers(config))
