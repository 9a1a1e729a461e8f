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
