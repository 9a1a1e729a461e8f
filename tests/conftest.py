"""What all tests share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

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
