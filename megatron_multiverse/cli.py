"""Command lines: flags from the fields of a dataclass, and one line for whatever goes wrong."""

from __future__ import annotations

import dataclasses
import difflib
import json
import keyword
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_multiverse.cli_files import part_of, refuse_unknown_part_keys, refuse_wrong_file
from megatron_multiverse.cli_messages import hyphenated, in_section, told
from megatron_multiverse.errors import ConfigError, MultiverseError

T = TypeVar("T")

DEBUG_FLAG = "--debug"
EXIT_CODE_INTERRUPTED = 130
UNSET = "null"
"""What stands for None on a command line; a file of this name is ./null."""

_ELSEWHERE = {
    "load": ("init_from",),
    "model": ("load", "init_from"),
    "model_path": ("load", "init_from"),
    "pretrained_checkpoint": ("init_from",),
    "data_path": ("data_prefixes",),
    "train_data_path": ("data_prefixes",),
    "valid_data_path": ("valid_prefixes",),
    "tokenizer": ("tokenizer_model",),
    "tokenizer_path": ("tokenizer_model",),
    "tp": ("tensor_model_parallel_size",),
    "tp_size": ("tensor_model_parallel_size",),
    "pp": ("pipeline_model_parallel_size",),
    "pp_size": ("pipeline_model_parallel_size",),
    "max_num_seqs": ("max_rows",),
    "max_num_batched_tokens": ("max_step_tokens",),
    "block_size": ("page_size",),
    "enable_prefix_caching": ("prefix_cache",),
}
"""What Megatron-LM, vLLM and SGLang call settings that have another name here; the first one that a tool has."""


def run_tool(main: Callable[[], None]) -> None:
    """Run `main` as a script: whatever it raises ends the process with one line on stderr and exit code 1.

    The flag ``--debug``, which every tool has, shows the traceback instead. An interrupt (Ctrl-C) ends with code 130.
    """
    debug = DEBUG_FLAG in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != DEBUG_FLAG]
    try:
        main()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_CODE_INTERRUPTED)
    except BaseException as error:  # torch's CheckpointException is no Exception
        if debug:
            traceback.print_exc()
        sys.exit(f"error: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    """What went wrong, where, and what to do next."""
    text = " ".join(str(error).split())
    if isinstance(error, MultiverseError):
        return text
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror])
    hint = f"this case has no message of its own; {DEBUG_FLAG} shows where it comes from"
    return f"{type(error).__name__}{': ' * bool(text)}{text} ({hint})"


def parse_options(cls: type[T], args: Sequence[str] | None = None) -> T:
    """Options of the running script: an instance of the dataclass `cls`.

    Flags may be written as Megatron does: with hyphens (``--num-rows``) or underscores, switches without a value
    (``--append-eod``), lists as several words (``--json-keys prompt response``; those of numbers and of fixed names
    with commas, too: ``--budgets 1024,2048``), fields of a nested dataclass after a dot (``--sampling.top-k 5``). Texts
    and paths are taken as they are written, also where YAML would read them as nothing (``# a comment``), but for
    ``null``, which unsets an optional name or path, not a `FreeText`.
    Values of the wrong type end the script with a message. Flags override the files of ``--config`` wherever these
    stand; of a flag that is given twice the last one counts, and stderr says so.

    Args:
        cls: a dataclass whose fields are the flags.
        args: the command line; default `sys.argv[1:]`.

    Raises:
        ConfigError: an unknown or shortened flag, or a YAML file that `cli_files.refuse_wrong_file` refuses.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):
        """Shows flags the way they are written: `--num-rows`, `--from`."""

        def format_help(self, *args: Any, **kwargs: Any) -> str:
            return re.sub(r"<class\s+'(\w+)'>", r"\1", hyphenated(str(super().format_help(*args, **kwargs))))

        def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
            """One line, without the usage, which is a page long."""
            if not self.exit_on_error:  # the parser of an optional part: whoever asked it knows the part's name
                super().error(message, ex)
            self.exit(2, f"error: {told(message)}; --help explains the flags\n")

        def format_usage(self) -> str:
            return hyphenated(str(super().format_usage()))

    # Not auto_cli: it would offer the methods of `cls` as subcommands.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_argument(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(cls)
    given = _files_first([_underscored(argument) for argument in (sys.argv[1:] if args is None else args)])
    _refuse_wrong_keys(cls, given)
    _refuse_unknown_flags(cls, given)
    _tell_of_repetitions(given)
    given, texts = _with_values(cls, given)
    parsed = parser.parse_args(given)
    for name, text in texts.items():
        parsed[name] = text
    return _build(cls, parsed)


def narrowed(options: Any, cls: type[T]) -> T:
    """The part of a script's options that a base class of theirs has: the run, without what the script adds."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _files_first(args: list[str]) -> list[str]:
    """The command line with every --config before the flags, which override it: jsonargparse reads from the left."""
    files: list[str] = []
    rest: list[str] = []
    taking = rest
    for argument in args:
        if argument.startswith("--"):
            taking = files if argument.partition("=")[0] == "--config" else rest
        taking.append(argument)
    return files + rest


def _tell_of_repetitions(args: list[str]) -> None:
    """Say which value counts where a flag is given twice: of a list, people expect both to."""
    seen: dict[str, list[str]] = {}
    for flag, words in _flags_with_words(args):
        if seen.get(flag, words) != words and flag != "--config" and os.environ.get("RANK", "0") == "0":
            shown = hyphenated(flag)
            print(f"{shown} is given twice: {' '.join(words) or 'the second'} counts", file=sys.stderr)
        if flag.startswith("--") and not flag.endswith("+"):  # the ending appends to a list
            seen[flag] = words


def _build(cls: type[T], values: Any, section: str = "") -> T:
    """The dataclass of parsed values. jsonargparse would bury the errors of optional parts in those of a union.

    Parts that stand in several places, such as those of the engine, name their fields alone where they refuse a value:
    the section is put before them.
    """
    from jsonargparse import Namespace

    hints = typing.get_type_hints(cls)
    built = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value, part = values[field.name], part_of(hints[field.name])
        is_part = part is not None and isinstance(value, Namespace)
        built[field.name] = _build(part, value, f"{section}{field.name}.") if part and is_part else value
    try:
        return cls(**built)
    except MultiverseError as error:
        error.args = (in_section(str(error), section, built),)
        raise


def _refuse_unknown_flags(cls: type[Any], args: list[str]) -> None:
    """Name an unknown flag with its nearest match. jsonargparse would show all flags and none in particular."""
    known = [*_every_flag(cls, "--"), "--config", DEBUG_FLAG, "--help", "--print_config"]
    for flag, _ in _flags_with_words(args):
        name = flag.removesuffix("+")  # jsonargparse's way to append to a list
        if name.startswith("--") and name not in known and not _is_in_mapping(name, known):
            raise ConfigError(f"unknown flag {hyphenated(flag)}; {hyphenated(_advice(name, known))}")


def _advice(name: str, known: list[str]) -> str:
    """Which of the known flags may be meant by `name`."""
    ends = {flag.rpartition(".")[2].removeprefix("--"): flag for flag in reversed(known)}
    section, _, end = name.rpartition(".")
    end = end.removeprefix("--")
    siblings = {flag.rpartition(".")[2]: flag for flag in known if section and flag.rpartition(".")[0] == section}
    # People leave out the part before the dot, or mistake it.
    close = [ends[near] for near in (end, *_ELSEWHERE.get(end, ())) if near in ends]
    close = close or [siblings[near] for near in difflib.get_close_matches(end, siblings, n=1)]
    close = close or ([] if siblings else difflib.get_close_matches(name, known, n=1, cutoff=0.75))
    close = close or [ends[near] for near in difflib.get_close_matches(end, ends, n=1, cutoff=0.75)]
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(siblings.values())}" if siblings else "--help shows those that there are"


def _every_flag(cls: type[Any], prefix: str) -> list[str]:
    """The flags of a dataclass, with those of its parts and optional parts."""
    flags = []
    for name, hint in typing.get_type_hints(cls).items():
        part = part_of(hint)
        flags += [f"{prefix}{name}", *(_every_flag(part, f"{prefix}{name}.") if part else [])]
    return flags


def _is_in_mapping(name: str, known: list[str]) -> bool:
    """Whether a flag names a key of a field that has no flags of its own (``--sampling.logit_bias.7``)."""
    outer = name.rpartition(".")[0]
    return outer in known and not any(flag.startswith(f"{outer}.") for flag in known)


def _refuse_wrong_keys(cls: type[Any], args: list[str]) -> None:
    """Files that --config or the flag of a part (``--sampling FILE``) names, and unknown keys of optional parts."""
    for flag, words in _flags_with_words(args):
        if "." in flag:
            nested: Any = None
            for name in reversed(flag[2:].split(".")):
                nested = {name: nested}
            refuse_unknown_part_keys(cls, nested)
        part = cls if flag == "--config" else part_of(typing.get_type_hints(cls).get(flag[2:]))
        for file in words if part else []:
            if part and Path(file).is_file():
                refuse_wrong_file(part, Path(file))


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    name = flag[2:].replace("-", "_")
    # A field cannot have the name of a Python keyword: --from is the field from_.
    return "--" + name + "_" * keyword.iskeyword(name) + equals + value


def _with_values(cls: type[Any], args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Give bare switches their value and gather the words after a list flag into one YAML list.

    Returns:
        The new command line, and by field the optional texts and paths that YAML would read as None and are not.
    """
    kinds = _kinds(cls, "--")
    result: list[str] = []
    texts: dict[str, Any] = {}
    for flag, words in _flags_with_words(args):
        kind = kinds.get(flag, "")
        if kind.endswith("bool") and not words:
            result.append(f"{flag}=true")
        elif kind.startswith(("list[", "tuple[")) and words:
            is_list = len(words) == 1 and isinstance(_from_yaml(words[0]), list)
            if not is_list and not kind.startswith(_TEXTS):  # numbers and names; a text or a path may have commas
                words = [part for word in words for part in [part for part in word.split(",") if part] or [word]]
            result.append(f"{flag}={words[0] if is_list else json.dumps(words, ensure_ascii=False)}")
        elif kind in _OPTIONAL_TEXTS and len(words) == 1:
            result.append(f"{flag}={words[0]}")
            if _from_yaml(words[0]) is None and (words[0] != UNSET or kind in _FREE_TEXTS):
                texts[flag[2:]] = _OPTIONAL_TEXTS[kind](words[0])
        elif kind and len(words) == 1:
            result.append(f"{flag}={words[0]}")
        else:
            result += [flag, *words]
    return result, texts


_TEXTS = ("list[str", "list[Path", "tuple[str", "tuple[Path")
_FREE_TEXTS = ("FreeText | None",)
_OPTIONAL_TEXTS: dict[str, Callable[[str], Any]] = {"str | None": str, "Path | None": Path, _FREE_TEXTS[0]: str}


def _flags_with_words(args: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words up to the next one; words before the first flag stand alone."""
    found: list[tuple[str, list[str]]] = []
    for argument in args:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(argument)
        else:
            found.append((argument, []))
    return found


def _from_yaml(text: str) -> Any:
    """What `text` says in YAML; the text itself if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _kinds(cls: type[Any], prefix: str) -> dict[str, str]:
    """Flag to annotation, the flags of nested dataclasses (``--sampling.top_k``) and of optional ones included."""
    kinds = {f"{prefix}{field.name}": str(field.type) for field in dataclasses.fields(cls)}
    for name, hint in typing.get_type_hints(cls).items():
        if part := part_of(hint):
            kinds |= _kinds(part, f"{prefix}{name}.")
    return kinds
