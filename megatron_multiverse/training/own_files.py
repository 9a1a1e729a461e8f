"""Which checkpoints are whole, which folders hold nothing but what this trainer wrote, how these are deleted."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from megatron_multiverse.checkpoints.run_files import MODEL_CONFIG_FILE, TOKENIZER_RECORD_FILE, TRAIN_CONFIG_FILE
from megatron_multiverse.checksums import CHECKSUMS_FILE

_LAST_WRITTEN = "metadata.json"
"""By megatron-core, once all else of a checkpoint is there."""
_WRITTEN = re.compile(
    r"\.metadata(\.tmp)?|metadata\.json|common\.pt|.+\.distcp"  # megatron-core and torch
    r"|tokenizer(_config)?\.json|tokenizer\.model|added_tokens\.json|special_tokens_map\.json|chat_template\.jinja"
    rf"|({TOKENIZER_RECORD_FILE}|{TRAIN_CONFIG_FILE}|{MODEL_CONFIG_FILE}|{CHECKSUMS_FILE})(\.\d+\.partial)?"
)
"""Names of the files in a checkpoint of ours."""


def is_complete(folder: Path) -> bool:
    """Whether the save of a checkpoint came to its end."""
    return (folder / _LAST_WRITTEN).is_file() and (folder / TRAIN_CONFIG_FILE).is_file()


def foreign_file(folder: Path) -> str | None:
    """What shows that a folder may hold something which this trainer did not write; None if all of it is ours."""
    if folder.is_symlink():
        return "it is a link"
    entries = sorted(folder.iterdir())
    for entry in entries:
        if not _WRITTEN.fullmatch(entry.name) or not entry.is_file() or entry.is_symlink():
            return f"it holds {entry.name}, which the trainer did not write"
    if entries and not (folder / TRAIN_CONFIG_FILE).is_file():
        return f"it has no {TRAIN_CONFIG_FILE}, which the trainer writes into each of its checkpoints"
    return None


def remove(folder: Path) -> None:
    """Delete a folder of ours. A crash may come in between, so what says that it is complete goes first, and what
    proves it to be ours last."""
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == TRAIN_CONFIG_FILE, file.name != _LAST_WRITTEN)):
        file.unlink()
    folder.rmdir()


class Clearing(threading.Thread):
    """Deletes folders of ours in a thread, which begins at once: a disk takes its time for large files.

    Args:
        folders: what is deleted.
    """

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(name="delete old checkpoints")
        self._folders = folders
        self._failure: OSError | None = None
        self.start()

    def run(self) -> None:
        """In the thread."""
        try:
            for folder in self._folders:
                remove(folder)
        except OSError as error:
            self._failure = error

    def result(self) -> None:
        """Wait for it. Raises OSError if a folder cannot be deleted."""
        self.join()
        if self._failure is not None:
            raise self._failure
