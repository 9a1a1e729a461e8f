"""The folder of a run takes other settings until something has been made in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_multiverse.errors import ConfigError
from megatron_multiverse.locked_folder import LockedFolder


def test_other_settings_are_refused_once_something_has_been_made(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for model in ("a", "b"):
        with LockedFolder(folder, {"model": model}, "an evaluation"):
            pass
    (folder / "samples.jsonl").write_text("")
    with LockedFolder(folder, {"model": "b"}, "an evaluation"):
        pass
    with (
        pytest.raises(ConfigError, match=r"other settings \(model was 'b' and is 'c' now\)"),
        LockedFolder(folder, {"model": "c"}, "an evaluation"),
    ):
        pass
    with (  # as where a server was asked before, which does not say its dtype
        pytest.raises(ConfigError, match=r"other settings \(dtype was not recorded, model is not known now\)"),
        LockedFolder(folder, {"dtype": "bf16"}, "an evaluation"),
    ):
        pass
