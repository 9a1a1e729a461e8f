"""Options from dataclasses: help as people write flags, values as Megatron writes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from megatron_multiverse.cli import parse_options


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


def test_an_unknown_flag_ends_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(Options, ["--apend-eod"])
    assert "apend" in capsys.readouterr().err


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


def test_fields_of_nested_dataclasses_are_flags_after_a_dot(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--engine.debug", "--engine.stop-ids", "3", "4"]
    assert parse_options(Outer, given) == Outer(engine=Nested(page_size=64, debug=True, stop_ids=(3, 4)))
    with pytest.raises(SystemExit):
        parse_options(Outer, ["--help"])
    assert "--engine.page-size" in capsys.readouterr().out
