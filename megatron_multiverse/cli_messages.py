"""What jsonargparse says of a wrong command line, in our words: one line, with flags as people write them."""

from __future__ import annotations

import re
from collections.abc import Container


def told(message: str) -> str:
    """What jsonargparse says of a wrong value, with flags as people write them and types in short."""
    text = _of_part(" ".join(message.split()))
    text = re.sub(r"^unrecognized arguments: (.*)", r"no flag takes \1: flags begin with --, values follow them", text)
    text = re.sub(r'Parser key "([^"]+)":', lambda key: hyphenated(f"--{key[1]}") + ":", text)
    text = re.sub(
        r"^(\S+): Unable to load config '(.*?)' .*", r"\1 takes a YAML file (\1.NAME one setting), got \2", text
    )
    text = re.sub(r"\. Got value: ", ", got ", text)
    text = re.sub(r"Expected an? typing\.Literal\[([^]]*)\]", r"expected one of \1", text)
    text = re.sub(r"Expected an? <class '(\w+)'>", r"expected \1", text)
    text = re.sub(
        r"Does not validate against any .*? Errors: (.*) Given value type: .* Given value: (.*)", _union, text
    )
    return re.sub(r"(?<=are required: ).*", lambda names: hyphenated(re.sub(r"(\S+)", r"--\1", names[0])), text)


_IN_PART = re.compile(
    r"Parser key \"([\w.]+)\": Does not validate against any of the Union subtypes Subtypes: \[.*?\] "
    r"Errors: - Problem with given class_path '[^']*': (.*)"
)
_OR_NOTHING = " - Expected a <class 'NoneType'> Given value type: "


def _of_part(text: str) -> str:
    """What jsonargparse says of a field of an optional part, as it would say it of one of any other part.

    It tells of the union of the part and None, whose errors are that of the part, with the field by its own name, and
    that the value is not None.
    """
    section = ""
    while told := _IN_PART.fullmatch(text):
        section += f"{told[1]}."
        text = told[2].rpartition(_OR_NOTHING)[0]
    text = re.sub(r'^Parser key "', lambda start: start[0] + section, text)
    required = "the following arguments are required: "
    if section and text.startswith(required):
        text = required + ", ".join(section + name for name in text.removeprefix(required).split(", "))
    return text


def _union(told: re.Match[str]) -> str:
    if "dot import path" in told[1]:  # an optional part, for which jsonargparse would take the name of a class
        return f"expected a YAML file or null, got {told[2]}: name single settings after a dot"
    types = dict.fromkeys(re.findall(r"- expected (\w+)", told[1]))
    return f"expected {' or '.join(types).replace('NoneType', 'null')}, got {told[2]}" if types else told[0]


def hyphenated(text: str) -> str:
    """Flags in a text as people write them: `--num-rows`, `--from`."""
    return re.sub(r"--[a-z][a-z0-9_.]*", lambda flag: "--" + flag.group()[2:].rstrip("_").replace("_", "-"), text)


def in_section(text: str, section: str, names: Container[str]) -> str:
    """What a part says of one of its fields, with the section that it stands in.

    Args:
        text: begins with the name of the field, if it speaks of one; or with that of the part, and that of the field
            after a dot.
        section: of the part, with a dot at its end: `model.rope_scaling.`; empty for no part.
        names: of its fields.
    """
    outer, _, own = section.removesuffix(".").rpartition(".")
    word = text.partition(" ")[0].removesuffix(":")
    if word in names:
        return f"{section}{text}"
    return f"{outer}.{text}" if outer and word.partition(".")[0] == own else text
