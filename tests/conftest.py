"""What all tests share."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.real_tokenizers import PACKAGES, real_tokenizer_folder

# Small tensors: one thread is fastest. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

with contextlib.suppress(ImportError):  # some environments run the few tests that need it not
    from hypothesis import HealthCheck, settings

    # How long it takes to draw or to run an example says how busy the machine is.
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), **patient)
    settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """No garbage collections until all modules of tests are there: of what they import nothing is garbage. The process
    of pytest-xdist that only hands tests out imports none of them."""
    if config.getoption("dist", "no") == "no":  # so it is in the processes that run the tests, too
        gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage collections do not look at what was imported, most of what there is."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Starts before the first test, if one of them runs programs that are forked: with the environment that pytest was
    given, not with that of a test."""
    if "tests.forked" in sys.modules:
        sys.modules["tests.forked"].start_fork_server()


@pytest.fixture(scope="session")
def samples_folder() -> Path:
    """Folder of real Multiverse-1K trajectories (*.xml), named by MULTIVERSE_SAMPLES."""
    default = Path(__file__).parents[1].parent / "shared" / "data" / "multiverse-1k-samples"
    folder = Path(os.environ.get("MULTIVERSE_SAMPLES", default))
    if not any(folder.glob("*.xml")):
        pytest.skip(f"no Multiverse-1K trajectories in {folder}; set MULTIVERSE_SAMPLES to a folder of *.xml")
    return folder


@pytest.fixture(scope="session", params=sorted(PACKAGES))
def real_tokenizer(request: pytest.FixtureRequest) -> Path:
    """Folder of each published tokenizer in turn; skips with a reason where npm cannot fetch it."""
    return real_tokenizer_folder(request.param)


@pytest.fixture(scope="session")
def qwen3_folder() -> Path:
    """Folder of Qwen3's published tokenizer; skips with a reason where npm cannot fetch it."""
    return real_tokenizer_folder("qwen3")


@pytest.fixture
def whole_figures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fails where a figure is saved with something beyond its edges; lists the names of those that were saved."""
    from matplotlib.figure import Figure

    save, saved = Figure.savefig, []

    def checked(figure: Figure, file: Any, **options: Any) -> None:
        figure.draw_without_rendering()  # which lays it out
        (width, height), box = figure.get_size_inches(), figure.get_tightbbox()
        beyond = max(-box.x0, -box.y0, box.x1 - width, box.y1 - height)
        assert beyond < 0.02, f"{file}: {beyond:.2f} inches of it are cut off"
        save(figure, file, **options)
        saved.append(Path(file).name.split(".")[0])

    monkeypatch.setattr(Figure, "savefig", checked)
    return saved
