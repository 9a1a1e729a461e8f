"""Documents of an indexed data set as token ids with their layout, and packs of them as training arrays."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_multiverse.checksums import quick_checksum, sampled_pieces
from megatron_multiverse.data.indexed_writer import SEQUENCES_PER_DOCUMENT
from megatron_multiverse.errors import DataError, StructureError, first_line
from megatron_multiverse.structure import (
    MAX_DEPTH,
    Document,
    Layout,
    StructureVocab,
    lay_out,
    pack_layouts,
    padding_layout,
    parse,
)

Malformed = Literal["refuse", "drop", "causal"]


@dataclass(frozen=True)
class Sample:
    """One document.

    Attributes:
        ids: int64 [N], prompt and response.
        layout: positions, visibility and loss of the N tokens.
    """

    ids: npt.NDArray[np.int64]
    layout: Layout
    index: int = -1
    """Number of the document in its data set."""
    problem: str | None = None
    """Why the structure could not be read, in which case the document is plain causal text; None if it was read."""


class SFTDataset:
    """Documents of two sequences, [prompt, response]. Each is parsed when it is asked for.

    Tags in a prompt are inert: structure begins with the response.

    Args:
        prefixes: paths of .bin/.idx pairs without suffix; their documents follow one another.
        structure_vocab: ids of the tags, from the tokenizer the data was made with.
        malformed: documents whose response breaks the grammar or nests deeper than 8: "refuse" raises; "causal" lays
            them out as plain text and "drop" as a prompt, which is never trained on, and both say why in
            `Sample.problem`.

    Raises:
        DataError: a file is missing, empty or damaged, the files of a prefix do not belong together, or its documents
            do not consist of two sequences.
    """

    def __init__(
        self, prefixes: str | Sequence[str], structure_vocab: StructureVocab, *, malformed: Malformed = "refuse"
    ) -> None:
        self.structure_vocab = structure_vocab
        self.malformed = malformed
        self.prefixes = [prefixes] if isinstance(prefixes, str) else list(prefixes)
        self._parts = [_open(prefix) for prefix in self.prefixes]
        self._sizes = [Path(f"{prefix}.bin").stat().st_size for prefix in self.prefixes]
        pairs = [part.sequence_lengths.reshape(-1, SEQUENCES_PER_DOCUMENT) for part in self._parts]
        self._first = np.cumsum([0, *map(len, pairs)])
        self.lengths: npt.NDArray[np.int64] = np.concatenate([pair.sum(axis=1, dtype=np.int64) for pair in pairs])
        """Tokens per document, shape [len(self)]."""
        self.prompt_lengths: npt.NDArray[np.int64] = np.concatenate([pair[:, 0].astype(np.int64) for pair in pairs])
        """Those of them that are its prompt, shape [len(self)]; 0 where a document has none."""
        self._first_token: npt.NDArray[np.int64] = np.cumsum(np.append(0, self.lengths))
        """Tokens of all documents before each, shape [len(self) + 1]; those of a .bin follow each other without gaps,
        which `_check_index` has seen."""
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """Parse document `index`.

        Raises:
            DataError: the response breaks the grammar and `malformed` is "refuse"; names prefix, document and token.
                Or a .bin file was cut off since it was opened.
        """
        prompt, response = self._sequences(index)
        ids = np.concatenate((prompt, response)).astype(np.int64)
        try:
            tree = parse(
                ids, self.structure_vocab, prompt_length=len(prompt), sample=self.name(index), max_depth=MAX_DEPTH
            )
        except StructureError as error:
            if self.malformed != "refuse":  # a dropped one keeps its place: rows were packed before it was parsed
                prompt_length = len(ids) if self.malformed == "drop" else len(prompt)
                return Sample(ids, lay_out(Document(len(ids), prompt_length)), index, str(error))
            raise DataError(
                f"{error}; make the files again with tools/preprocess_data.py and the tokenizer of this run, or set "
                "data.malformed to drop to leave such documents out, or to causal to train them as plain text"
            ) from error
        return Sample(ids, lay_out(tree), index)

    def prompt(self, index: int) -> list[int]:
        """The ids of the prompt of document `index`."""
        return [int(token) for token in self._sequences(index)[0]]

    def name(self, index: int) -> str:
        """Prefix and number of document `index`, as errors and reports name it."""
        part, document = self._place(index)
        return f"{self.prefixes[part]} document {document}"

    def first_document(self, prefix: int) -> int:
        """Number of the first document of the prefix with this number; for the number of prefixes, len(self)."""
        return int(self._first[prefix])

    def last_token(self, index: int) -> int | None:
        """The last id of document `index`; None if its response is empty."""
        response = self._sequences(index)[1]
        return int(response[-1]) if len(response) else None

    def _sequences(self, index: int) -> list[npt.NDArray[Any]]:
        """Prompt and response of document `index`.

        The .bin is mapped: of a file that became shorter in place the kernel ends whoever reads beyond its end
        (SIGBUS), and nobody learns why. So its size is asked for before each read. A file that is cut off between the
        question and the read still ends the process; one that is written elsewhere and renamed harms nobody. Of the
        .idx, which is mapped as well, nothing is read after the start: places and lengths are in memory.
        """
        part, _ = self._place(index)
        data = self._parts[part]
        if (size := os.fstat(data.bin_reader._bin_file_reader.fileno()).st_size) < self._sizes[part]:
            raise DataError(
                f"{self.prefixes[part]}.bin was cut off as it was read: it has {size} bytes, and had "
                f"{self._sizes[part]}; make it whole again, and do not write over files that a run reads: write "
                "others and rename them"
            )
        first = int(self._first_token[index] - self._first_token[self._first[part]])
        tokens: npt.NDArray[Any] = data.bin_reader.read(
            dtype=data.index.dtype, count=int(self.lengths[index]), offset=first * data.index.dtype_size
        )
        prompt_length = int(self.prompt_lengths[index])
        return [tokens[:prompt_length], tokens[prompt_length:]]

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return part, index - int(self._first[part])

    def fingerprint(self) -> str:
        """Hash of the document lengths and the tokens: tells another data set from this one when a run resumes.

        Of files above 64 MiB only 64 places are read, so that the start of a run does not wait for terabytes. In such
        files a change of single tokens that leaves every length as it was may go unseen.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
            for prefix in self.prefixes:
                for piece in sampled_pieces(Path(f"{prefix}.bin")):
                    digest.update(piece)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


def pack_arrays(
    samples: Sequence[Sample],
    seq_length: int,
    pad: int,
    *,
    num_documents: int | None = None,
    train_forced_tokens: bool = False,
) -> dict[str, npt.NDArray[Any]]:
    """One training sequence from whole samples and padding.

    Args:
        samples: together at most `seq_length` tokens.
        seq_length: S.
        pad: token id of the padding, which is a document of its own and never trained on.
        num_documents: D, at least one more than there are samples; default that number.
        train_forced_tokens: also train on what the engine forces.

    Returns:
        Arrays of shape [S]. ``labels[i]`` is token i + 1 (`pad` after the last) and ``loss_mask[i]`` (float32) is 1
        where that token is trained as the target of token i: never across documents, in prompts or at the end of a
        path. ``input_ids`` and ``labels`` int64, ``position_ids`` int64, ``r`` int32.

        Per document, in order: ``documents`` int32 [D, 2], the index of its first token and the one at which its
        structure begins: after the prompt, or at its end for padding and for plain text, which hold none; unused rows
        are (S, S). ``sample_ids`` int64 [D], its number in the data set; -1 for padding and unused rows. ``malformed``
        bool [D], whether it is laid out as plain text because its structure could not be read.
    """
    used = sum(len(sample.ids) for sample in samples)
    layouts = [sample.layout for sample in samples]
    if used < seq_length:
        layouts.append(padding_layout(seq_length - used))
    packed = pack_layouts(layouts)
    ids = np.full(seq_length, pad, dtype=np.int64)
    ids[:used] = np.concatenate([ids[:0], *(sample.ids for sample in samples)])
    is_target = packed.loss_mask(train_forced_tokens=train_forced_tokens)
    is_target[np.cumsum([0, *(part.num_tokens for part in layouts[:-1])])] = False  # nothing predicts a first token
    return {
        "input_ids": ids,
        "labels": np.append(ids[1:], pad),
        "loss_mask": np.append(is_target[1:], False).astype(np.float32),
        "position_ids": packed.position_ids.astype(np.int64),
        "r": packed.r,
        **_document_arrays(samples, seq_length, num_documents or len(samples) + 1),
    }


def _document_arrays(samples: Sequence[Sample], seq_length: int, num_documents: int) -> dict[str, npt.NDArray[Any]]:
    """`documents`, `sample_ids` and `malformed` of one pack, see `pack_arrays`."""
    if num_documents <= len(samples):
        raise ValueError(f"num_documents ({num_documents}) must exceed the number of samples ({len(samples)})")
    documents = np.full((num_documents, 2), seq_length, dtype=np.int32)
    sample_ids = np.full(num_documents, -1, dtype=np.int64)
    malformed = np.zeros(num_documents, dtype=np.bool_)
    start = 0
    for row, sample in enumerate(samples):
        end = start + len(sample.ids)
        prompt_length = int(sample.layout.prompts[0, 1])
        documents[row] = start, end if sample.problem else start + prompt_length
        sample_ids[row] = sample.index
        malformed[row] = sample.problem is not None
        start = end
    documents[len(samples), 0] = start
    return {"documents": documents, "sample_ids": sample_ids, "malformed": malformed}


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """What tools/preprocess_data.py wrote down about PREFIX.bin/.idx; None if there is no manifest.

    Raises:
        DataError: it is damaged.
    """
    file = Path(f"{prefix}_manifest.json")
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}): run tools/preprocess_data.py again") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{file} is damaged (no JSON object): run tools/preprocess_data.py again")
    return manifest


def _open(prefix: str) -> Any:
    for suffix in (".bin", ".idx"):
        file = Path(prefix + suffix)
        if not file.is_file():
            named = Path(prefix)
            if named.suffix in (".bin", ".idx") and named.is_file():
                raise DataError(f"no {file}: {prefix} is a file; name it without its ending, {named.with_suffix('')}")
            # Several are written with commas or blanks in Megatron's --data-path.
            several = "if these are several prefixes, write '[A, B]', without weights; else "
            how = f"make it with tools/preprocess_data.py --output-prefix {shlex.quote(prefix)}"
            raise DataError(f"no {file}; {several if any(sign in prefix for sign in ', ') else ''}{how}")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty: preprocessing rejected every row, see {prefix}_rejected.jsonl")
    # Imported here: it brings torch and takes seconds, which the rest of the package does not need.
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset: Any = IndexedDataset.__new__(IndexedDataset)
    dataset.bin_reader = dataset.index = None  # its __del__ would complain of a half-made one that lacks them
    try:
        IndexedDataset.__init__(dataset, prefix)
        documents = dataset.document_indices
    except Exception as error:  # it parses the header with assertions, struct and numpy
        raise DataError(f"{prefix}.idx is damaged ({first_line(error)}): {_AGAIN}") from error
    _check_index(prefix, dataset)
    if not np.array_equal(documents, np.arange(0, len(dataset.sequence_lengths) + 1, SEQUENCES_PER_DOCUMENT)):
        raise DataError(
            f"{prefix}: each document must hold two sequences, prompt and response; make the files with "
            "tools/preprocess_data.py"
        )
    _check_manifest(prefix, dataset.sequence_lengths)
    return dataset


_AGAIN = "copy both files again, or run tools/preprocess_data.py again"


def _check_index(prefix: str, dataset: Any) -> None:
    """The lengths of the .idx must fill the .bin, one sequence after the other."""
    lengths, itemsize = dataset.sequence_lengths.astype(np.int64), dataset.index.dtype_size
    size, ends = Path(f"{prefix}.bin").stat().st_size, np.cumsum(lengths) * itemsize
    if lengths.min(initial=0) < 0 or not np.array_equal(dataset.index.sequence_pointers, ends - lengths * itemsize):
        raise DataError(f"{prefix}.idx is damaged (its lengths and places contradict each other): {_AGAIN}")
    expected = int(ends[-1]) if len(ends) else 0
    if size != expected:
        raise DataError(
            f"{prefix}.bin has {size} bytes, {prefix}.idx asks for {expected}: one of them is cut off or of another "
            f"run; {_AGAIN}"
        )


def _check_manifest(prefix: str, lengths: npt.NDArray[np.int32]) -> None:
    """Documents, tokens and content must be those of the files that were written."""
    manifest = read_manifest(prefix) or {}
    _check_content(prefix, manifest.get("files"))
    totals = manifest.get("totals")
    if not isinstance(totals, dict):
        return
    prompts, responses = lengths.reshape(-1, SEQUENCES_PER_DOCUMENT).sum(axis=0, dtype=np.int64)
    documents = len(lengths) // SEQUENCES_PER_DOCUMENT
    # The end tokens that --append-eod adds, at most one per document, are not counted in response_tokens.
    for name, value, uncounted in (
        ("documents", documents, 0),
        ("prompt_tokens", int(prompts), 0),
        ("response_tokens", int(responses), documents),
    ):
        if not 0 <= value - totals.get(name, value) <= uncounted:
            raise DataError(
                f"{prefix}.idx holds {value} {name.replace('_', ' ')}, {prefix}_manifest.json says {totals[name]}: "
                f"they are of different runs; {_AGAIN}"
            )


def _check_content(prefix: str, files: Any) -> None:
    """Hold the files against the quick checksums of the manifest; older manifests have none."""
    for suffix, recorded in files.items() if isinstance(files, dict) else ():
        if quick_checksum(Path(f"{prefix}{suffix}")) != recorded.get("quick_checksum"):
            raise DataError(
                f"{prefix}{suffix} is not the file that {prefix}_manifest.json speaks of: its content is of another "
                f"run, or damaged; {_AGAIN}"
            )
