"""Options from dataclasses: help as people write flags, values as Megatron writes them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_multiverse.cli import parse_options, run_tool
from megatron_multiverse.cli_messages import in_section
from megatron_multiverse.config import EngineConfig, RLConfig, SamplingParams, TrainConfig
from megatron_multiverse.config.choices import FreeText
from megatron_multiverse.config.model import RopeScaling
from megatron_multiverse.errors import ConfigError, GenerationError


@dataclass(frozen=True, kw_only=True)
class Options:
    """A tool."""

    from_: str = "hf"
    """Where from."""
    append_eod: bool = False
    """A switch."""
    json_keys: list[str] = field(default_factory=list)
    """Several words."""


def test_help_shows_the_flags_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(Options, ["--help"])
    shown = capsys.readouterr().out
    assert "--from " in shown
    assert "--append-eod" in shown
    assert "_eod" not in shown
    options = parse_options(Options, ["--from", "mcore", "--append-eod", "--json-keys", "a", "b"])
    assert options == Options(from_="mcore", append_eod=True, json_keys=["a", "b"])


def test_the_nearest_match_of_an_unknown_flag_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^unknown flag --apend-eod; did you mean --append-eod\?$"):
        parse_options(Options, ["--apend-eod"])
    with pytest.raises(ConfigError, match=r"^unknown flag --form; did you mean --from\?$"):
        parse_options(Options, ["--form=mcore"])
    with pytest.raises(ConfigError, match=r"^unknown flag --zzz; --help shows those that there are$"):
        parse_options(Options, ["--zzz", "3"])
    with pytest.raises(ConfigError, match=r"^unknown flag --engine.page-sise; did you mean --engine.page-size\?$"):
        parse_options(Outer, ["--engine.page-sise", "3"])
    for wrong in ("--page-size", "--page_sizes", "--server.page-size"):
        with pytest.raises(ConfigError, match=r"; did you mean --engine.page-size\?$"):
            parse_options(Outer, [wrong, "3"])
    with pytest.raises(ConfigError, match=r"^unknown flag --page-size; did you mean --model.page-size\?$"):
        parse_options(WithOptionalPart, ["--page-size", "3"])


def test_names_of_other_tools_and_of_sections_lead_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Tool:
        load: Path | None = None
        """A folder."""
        part: Nested = field(default_factory=Nested)
        """A part."""

    with pytest.raises(ConfigError, match=r"^unknown flag --model; did you mean --load\?$"):
        parse_options(Tool, ["--model", "x"])
    with pytest.raises(ConfigError, match=r"^unknown flag --block-size; did you mean --part.page-size\?$"):
        parse_options(Tool, ["--block-size", "x"])
    with pytest.raises(
        ConfigError, match=r"^unknown flag --part.zzz; there are --part.page-size, --part.debug, --part.stop-ids$"
    ):
        parse_options(Tool, ["--part.zzz", "x"])
    for words, told in (
        (["folder"], "error: no flag takes folder: flags begin with --, values follow them; --help"),
        (["--part", "x"], "error: --part takes a YAML file (--part.NAME one setting), got x; --help"),
    ):
        with pytest.raises(SystemExit):
            parse_options(Tool, words)
        assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"run\.yaml is empty: write settings into it"),
        ("# nothing\n", r"run\.yaml is empty"),
        ("- 3\n", r"run\.yaml holds a list: write settings"),
        ("a: [1\n", r"run\.yaml, line 2, column 1: no YAML \(expected"),
        ("apend_eod: true\n", r"run\.yaml: no setting is called 'apend_eod'; did you mean append_eod\?$"),
        ("page_size: 3\n", r"run\.yaml: no setting is called 'page_size'; did you mean engine\.page_size\?$"),
        ("engine:\n  page_sise: 3\n", r"run\.yaml: engine has no setting 'page_sise'; did you mean page_size\?$"),
        ("engine:\n  zzz: 3\n", r"run\.yaml: engine has no setting 'zzz'; allowed are page_size, debug, stop_ids$"),
        ("engine:\nname: a\n", r"run\.yaml: nothing stands below engine: write its settings there, or remove it$"),
        ("name:\n", r"run\.yaml: nothing stands beside name: write its settings there, or remove it$"),
    ],
)
def test_a_file_that_does_not_fill_the_options_is_named(tmp_path: Path, text: str, told: str) -> None:
    @dataclass
    class Tool:
        append_eod: bool = False
        """A switch."""
        name: str | None = None
        """A text."""
        engine: Nested = field(default_factory=Nested)
        """A part."""

    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        parse_options(Tool, ["--config", str(file)])
    file.write_text("engine.page_size: 3\nname: null\n")
    assert parse_options(Tool, ["--config", str(file)]).engine.page_size == 3
    file.write_text("page_size: 4\n")
    assert parse_options(Tool, ["--engine", str(file)]).engine.page_size == 4
    file.write_text("page_sise: 4\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: no setting is called 'page_sise'; did you mean page_size\?$"):
        parse_options(Tool, ["--engine", str(file)])


@dataclass(frozen=True, kw_only=True)
class Nested:
    """A part."""

    page_size: int = 16
    """A number."""
    debug: bool = False
    """A switch."""
    stop_ids: tuple[int, ...] = ()
    """Several numbers."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A tool with parts."""

    engine: Nested = field(default_factory=lambda: Nested(page_size=64))
    """Its part."""


def test_flags_override_files_wherever_these_stand(tmp_path: Path) -> None:
    for name, value in (("a", "first"), ("b", "second")):
        (tmp_path / f"{name}.yaml").write_text(f"from_: {value}\nappend_eod: true\n")
    a, b = (f"--config={tmp_path / name}.yaml" for name in "ab")
    assert parse_options(Options, [a, "--from", "flag"]).from_ == "flag"
    assert parse_options(Options, ["--from", "flag", "--json-keys", "x", a]) == Options(
        from_="flag", append_eod=True, json_keys=["x"]
    )
    assert parse_options(Options, ["--json-keys", "x", "--config", str(tmp_path / "b.yaml"), a]).from_ == "first"
    assert parse_options(Options, [a, b]).from_ == "second", "files among each other keep their order"


def test_of_a_flag_given_twice_the_last_one_counts_and_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = ["--json-keys", "a", "b", "--json_keys", "c", "--from=x", "--from", "x"]
    assert parse_options(Options, twice).json_keys == ["c"]
    assert capsys.readouterr().err == "--json-keys is given twice: c counts\n"
    assert parse_options(Options, ["--json-keys", "a", "--json-keys+", "c"]).json_keys == ["a", "c"]
    assert parse_options(Outer, ["--engine.page-size", "3", "--engine.page-size", "5"]).engine.page_size == 5
    assert capsys.readouterr().err == "--engine.page-size is given twice: 5 counts\n"
    monkeypatch.setenv("RANK", "1")
    parse_options(Options, twice)
    assert capsys.readouterr().err == "", "one rank says it"


def test_a_key_with_a_dot_beside_its_section_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text in ("engine.page_size: 3\nengine: {}\n", "engine:\n  page_size: 4\nengine.page_size: 3\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"^{file}: engine.page_size and engine stand side by side: write it be"):
            parse_options(Outer, ["--config", str(file)])
    file.write_text("engine.page_size: 3\n")
    assert parse_options(Outer, ["--config", str(file)]).engine.page_size == 3


def test_fields_of_nested_dataclasses_are_flags_after_a_dot(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--engine.debug", "--engine.stop-ids", "3", "4"]
    assert parse_options(Outer, given) == Outer(engine=Nested(page_size=64, debug=True, stop_ids=(3, 4)))
    with pytest.raises(SystemExit):
        parse_options(Outer, ["--help"])
    assert "--engine.page-size" in capsys.readouterr().out


def test_numbers_and_fixed_names_may_have_commas_between_them_and_texts_keep_theirs() -> None:
    @dataclass
    class Options:
        budgets: list[int] = field(default_factory=list)
        """Numbers."""
        kinds: tuple[Literal["a", "b"], ...] = ()
        """Names."""
        files: list[Path] = field(default_factory=list)
        """Paths."""
        stop: tuple[str, ...] = ()
        """Texts."""

    assert parse_options(Options, ["--budgets", "1024,2048", "4096,"]).budgets == [1024, 2048, 4096]
    assert parse_options(Options, ["--budgets=1024,2048"]).budgets == [1024, 2048]
    with pytest.raises(SystemExit):
        parse_options(Options, ["--budgets", ""])  # as of a variable that is empty
    assert parse_options(Options, ["--budgets", "[1024,2048]", "--kinds=a,b"]) == Options([1024, 2048], ("a", "b"))
    assert parse_options(Options, ["--files", "a,b", "--stop", "c,d"]) == Options(files=[Path("a,b")], stop=("c,d",))
    assert parse_options(Outer, ["--engine.stop-ids", "3,4"]).engine.stop_ids == (3, 4)


@dataclass(frozen=True, kw_only=True)
class Named:
    """A part with a name."""

    name: str | None = "c"
    """A name."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A tool with texts."""

    prompt: FreeText | None = None
    """Text."""
    name: str | None = "a"
    """A name."""
    output: Path | None = Path("b")
    """A path."""
    stop: list[str] = field(default_factory=list)
    """Texts."""
    limit: int | None = 3
    """A number or nothing."""
    part: Named | None = None
    """A part that may be left out."""


@pytest.mark.parametrize("text", ["# Explain it", "null", "~", "", "[1, 2]", "a: b", '"quoted"', "-5 + 3", "é\n😀"])
def test_texts_are_taken_as_they_are_written(text: str) -> None:
    assert parse_options(Texts, ["--prompt", text]).prompt == text
    assert parse_options(Texts, [f"--prompt={text}"]).prompt == text
    if text != "null":
        assert parse_options(Texts, ["--name", text]).name == text
        assert parse_options(Texts, ["--output", text]).output == Path(text)
    assert parse_options(Texts, ["--stop", text, "b"]).stop == [text, "b"]


def test_null_unsets_what_is_no_text(tmp_path: Path) -> None:
    assert parse_options(Texts, ["--limit", "null"]).limit is None
    (tmp_path / "run.yaml").write_text("name: x\noutput: y\npart: {name: z}\n")
    file = f"--config={tmp_path}/run.yaml"
    assert parse_options(Texts, [file, "--name", "null", "--output=null"]) == Texts(
        name=None, output=None, part=Named(name="z")
    )
    assert parse_options(Texts, [file, "--part.name", "null"]).part == Named(name=None)
    assert parse_options(Texts, [file, "--part.name", "~"]).part == Named(name="~")
    assert parse_options(Texts, ["--output", "./null"]).output == Path("null")
    assert parse_options(Texts, ["--stop", "[a, b]"]).stop == ["a", "b"]
    assert parse_options(Texts, ["--stop", "["]).stop == ["["]


@pytest.mark.parametrize("flag", ["--pro", "--prom=x", "--lim"])
def test_shortened_flags_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown flag {flag.partition('=')[0]};"):
        parse_options(Texts, [flag, "1"])


class NotAnException(BaseException):
    """As torch's CheckpointException is."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ConfigError("field is 3\nallowed: 4"), "error: field is 3 allowed: 4"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "error: a.json: No such file or directory"),
        (KeyError("lr"), "error: KeyError: 'lr' (this case"),
        (NotAnException("damaged\ndata"), "error: NotAnException: damaged data (this case"),
    ],
)
def test_any_error_ends_a_tool_with_one_line(
    error: BaseException, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["tool"])
    with pytest.raises(SystemExit) as ended:
        run_tool(fail)
    assert str(ended.value).startswith(shown)
    assert "\n" not in str(ended.value)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.argv", ["tool", "--debug", "--x"])
    with pytest.raises(SystemExit):
        run_tool(fail)
    assert "Traceback" in capsys.readouterr().err
    assert sys.argv == ["tool", "--x"]


def test_an_interrupt_ends_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["tool"])
    with pytest.raises(SystemExit) as ended:
        run_tool(interrupt)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@dataclass(frozen=True, kw_only=True)
class WithOptionalPart:
    """A tool whose part may be left out."""

    model: Nested | None = None
    """A part."""


def test_an_unknown_key_of_an_optional_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model has no setting 'page_sise'; did you mean page_size\?$"):
        parse_options(WithOptionalPart, ["--model.page-sise", "3"])
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  zzz: 3\n")
    with pytest.raises(
        ConfigError, match=r"run\.yaml: model has no setting 'zzz'; allowed are page_size, debug, stop_ids$"
    ):
        parse_options(WithOptionalPart, ["--config", str(file)])
    file.write_text("model:\n  page_size: 3\n")
    given = ["--config", str(file), "--model.debug", "true"]
    assert parse_options(Texts, ["--stop+=a", "--stop+", "b"]).stop == ["a", "b"]
    assert parse_options(WithOptionalPart, given) == WithOptionalPart(model=Nested(page_size=3, debug=True))


@dataclass(frozen=True, kw_only=True)
class Deep:
    """A part with a part, both of which may be left out."""

    inner: Nested | None = None
    """A part."""
    size: int
    """A number."""
    most: int | None = None
    """A number or nothing."""
    kind: Literal["a", "b"] = "a"
    """A name."""


@dataclass(frozen=True, kw_only=True)
class WithDeepPart:
    """A tool with such a part."""

    deep: Deep | None = None
    """A part."""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--deep.size", "x"], "--deep.size: expected int, got x"),
        (["--deep.most", "x"], "--deep.most: expected int or null, got x"),
        (["--deep.kind", "c"], "--deep.kind: expected one of 'a', 'b', got c"),
        (["--deep.inner.page-size", "x"], "--deep.inner.page-size: expected int, got x"),
        (["--deep.inner.page-size", "3"], "the following arguments are required: --deep.size"),
        (["--deep.inner", "7"], "--deep.inner: expected a YAML file or null, got 7: name single settings after a dot"),
        (["--deep", "7"], "--deep: expected a YAML file or null, got 7: name single settings after a dot"),
        (["deep: {size: x}"], "--deep.size: expected int, got x"),
        (["deep: {size: 3, inner: {debug: 5}}"], "--deep.inner.debug: expected bool, got 5"),
        (["deep: {kind: a}"], "the following arguments are required: --deep.size"),
    ],
)
def test_a_wrong_field_of_an_optional_part_is_named_with_its_section(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], told: str
) -> None:
    if not words[0].startswith("--"):
        (tmp_path / "run.yaml").write_text(words[0])
        words = ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(SystemExit) as ended:
        parse_options(WithDeepPart, words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {told}; --help explains the flags\n"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A part that several tools have, which knows no section."""

    size: int = 1
    """A number."""

    def __post_init__(self) -> None:
        if self.size == 0:
            raise GenerationError("size must be at least 1, got 0")
        if self.size == -1:
            raise GenerationError("checked.size must not be -1")
        if self.size < 0:
            raise GenerationError("the part has no size below 0")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A part with such a part."""

    checked: Checked = field(default_factory=Checked)
    """A part."""
    optional: Checked | None = None
    """One that may be left out."""


@dataclass(frozen=True, kw_only=True)
class WithHolder:
    """A tool."""

    holder: Holder = field(default_factory=Holder)
    """A part."""


def test_a_value_that_a_part_refuses_is_named_with_its_section() -> None:
    for name in ("checked", "optional"):
        with pytest.raises(GenerationError, match=rf"^holder\.{name}\.size must be at least 1, got 0$"):
            parse_options(WithHolder, [f"--holder.{name}.size", "0"])
        with pytest.raises(GenerationError, match=r"^the part has no size below 0$"):
            parse_options(WithHolder, [f"--holder.{name}.size", "-3"])
    with pytest.raises(GenerationError, match=r"^holder\.checked\.size must not be -1$"):
        parse_options(WithHolder, ["--holder.checked.size", "-1"])
    for size, told in (("0", "size must be at least 1, got 0"), ("-1", r"checked\.size must not be -1")):
        with pytest.raises(GenerationError, match=f"^{told}$"):
            parse_options(Checked, ["--size", size])


def test_switches_and_lists_of_an_optional_part_are_written_like_others() -> None:
    given = ["--model.debug", "--model.stop-ids", "3", "4"]
    assert parse_options(WithOptionalPart, given).model == Nested(debug=True, stop_ids=(3, 4))


def test_help_names_types_without_python_s_words(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Options:
        load: Path
        """A folder."""

    with pytest.raises(SystemExit):
        parse_options(Options, ["--help"])
    shown = capsys.readouterr().out
    assert "type: Path" in shown and "<class" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-rows", "x", "--kind", "a"], "--num-rows: expected int, got x"),
        (["--num-rows", "1", "--kind", "a", "--most", "x"], "--most: expected int or null, got x"),
        (["--num-rows", "1", "--kind", "c"], "--kind: expected one of 'a', 'b', got c"),
        ([], "the following arguments are required: --num-rows, --kind"),
    ],
)
def test_a_wrong_value_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    @dataclass
    class Options:
        num_rows: int
        """Rows."""
        kind: Literal["a", "b"]
        """Of them."""
        most: int | None = None
        """At most."""

    with pytest.raises(SystemExit) as ended:
        parse_options(Options, words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}; --help explains the flags\n"


def refusals(cls: type[Any]) -> list[str]:
    """How the messages begin by which a part refuses values, but for those that begin with what a loop goes through."""
    found = []
    for call in ast.walk(ast.parse(inspect.getsource(cls))):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("check", "refuse_unless"):
            message = call.args[1]
            first = message.values[0] if isinstance(message, ast.JoinedStr) else message
            if isinstance(first, ast.Constant):
                found.append(str(first.value))
    return found


@pytest.mark.parametrize(
    ("cls", "own", "least"),
    [(RopeScaling, "rope_scaling", 2), (EngineConfig, "engine", 2), (SamplingParams, "sampling", 12)],
)
def test_every_message_of_a_part_gets_its_section(cls: type[Any], own: str, least: int) -> None:
    messages, names = refusals(cls), {field.name for field in dataclasses.fields(cls)}
    assert len(messages) >= least
    for text in messages:
        assert re.match(rf"outer\.{own}\b", in_section(text, f"outer.{own}.", names)), text


def test_a_file_of_the_other_training_script_leads_there() -> None:
    configs = Path(__file__).parents[2] / "pretrain_scripts/configs"
    for cls, file, key, script in (
        (TrainConfig, "rl_quickstart", "task", "rl_multiverse"),
        (RLConfig, "tiny_cpu", "model", "sft_multiverse"),
    ):
        told = (
            rf"{file}\.yaml: no setting is called '{key}'; it is one of pretrain_scripts/{script}\.py, for whose runs"
        )
        with pytest.raises(ConfigError, match=told):
            parse_options(cls, ["--config", str(configs / f"{file}.yaml")])


@pytest.mark.parametrize(("script", "file"), [("rl_multiverse", "rl_quickstart"), ("sft_multiverse", "tiny_cpu")])
def test_a_shape_to_try_is_refused_without_a_dry_run(script: str, file: str) -> None:
    options = importlib.import_module(f"pretrain_scripts.{script}").Options
    args = ["--config", f"{Path(__file__).parents[2]}/pretrain_scripts/configs/{file}.yaml"]
    args += ["--dry-run-shape", "qwen2.5-7b"]
    with pytest.raises(ConfigError, match=r"^dry_run_shape qwen2\.5-7b has no effect without --dry-run: set both"):
        parse_options(options, args)
    assert parse_options(options, [*args, "--dry-run"]).dry_run_shape == "qwen2.5-7b"
