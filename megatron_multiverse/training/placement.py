"""Where the tokens of a microbatch stand: scanned on the GPU, or as the loader computed it.

On CUDA `kernels.structure_scan` makes positions, labels and tile lists from the token ids, with nothing read back;
elsewhere the loader's arrays are used. Both follow the same rule (structure/layout.py) and agree. Documents that are
laid out as plain text, because their structure cannot be read, are remembered and named at the next `report`.
"""

from __future__ import annotations

import itertools
import logging

import torch
from torch import Tensor

from megatron_multiverse.errors import TrainingError
from megatron_multiverse.kernels.structure_scan import StructureScan, structure_scan
from megatron_multiverse.model.attention import LayoutParams
from megatron_multiverse.model.device import to_device
from megatron_multiverse.parallel.ranks import current_ranks
from megatron_multiverse.structure import Tag
from megatron_multiverse.training.metrics import MetricsWriter
from megatron_multiverse.training.microbatches import Documents, Microbatch

logger = logging.getLogger(__name__)


class TokenPlacer:
    """Lays out the microbatches of one loader.

    Args:
        loader: without tag ids (see `Documents.tag_ids`), ``position_ids`` and ``r`` of its microbatches count on every
            device.
        device: where the model runs.
        backend: name of the attention backend that runs; not "auto".
        malformed: what is done with documents whose structure cannot be read, see `DataConfig.malformed`. Those that
            the scan alone cannot read stop the run unless it is causal: they are trained already.
    """

    def __init__(self, loader: Documents, device: torch.device, backend: str, malformed: str = "refuse") -> None:
        self.device = device
        self._loader = loader
        self._backend = backend
        self._malformed = malformed
        self.tag_ids = tag_ids = loader.tag_ids
        scans = tag_ids is not None and device.type == "cuda"
        self._tag_ids = torch.tensor(tag_ids, dtype=torch.int32, device=device) if scans else None
        self._compared, self._compared_block = False, False
        self._told: set[int] = set()
        self._parsed: list[tuple[Tensor, Tensor]] = []  # (sample ids, flags) of microbatches, on the host
        self._scanned: list[tuple[Tensor, Tensor]] = []  # the same by the scan, flags on the device

    def place(self, batch: Microbatch, input_ids: Tensor) -> tuple[Tensor, LayoutParams]:
        """Position ids [b, s] and what attention sees.

        Args:
            batch: the microbatch, on the host.
            input_ids: its token ids, on the device.
        """
        if self._loader.tag_ids is not None:
            self._parsed.append((batch["sample_ids"], batch["malformed"]))
        if self._tag_ids is None:
            r = to_device(batch["r"], self.device)
            return to_device(batch["position_ids"], self.device), LayoutParams.from_labels(r, backend=self._backend)
        scan = structure_scan(input_ids, to_device(batch["documents"], self.device), self._tag_ids)
        self._scanned.append((batch["sample_ids"], scan.malformed))
        self._compare(scan, batch)
        return scan.position_ids, LayoutParams.from_labels(scan.r, lists=scan.lists, backend=self._backend)

    def _compare(self, scan: StructureScan, batch: Microbatch) -> None:
        """Compare scan and loader on the first microbatch of a run, and on the first one that has a block."""
        if self._compared_block:
            return
        assert self._loader.tag_ids is not None  # without them nothing is scanned
        has_block = self._loader.tag_ids[Tag.PARALLEL] in batch["input_ids"]
        if has_block or not self._compared:
            raise_unless_equal(scan, batch)
            self._compared, self._compared_block = True, has_block

    def report(self, step: int, metrics: MetricsWriter) -> None:
        """Name each document, once per process, that was laid out as plain text on any rank (waits for the device).

        Raises:
            TrainingError: the scan could not read a document, and such are to be refused.
        """
        ranks = current_ranks()
        for sample in _merged(ranks.gather(_flagged(self._parsed))):
            self._tell(sample, step, metrics, "parser", self._loader.sample_problem(sample) or "malformed")
        for sample in _merged(ranks.gather(_flagged(self._scanned))):
            name = self._loader.sample_name(sample)
            problem = f"{name}: the scan on the GPU cannot read the structure that the loader let pass"
            if self._malformed != "causal":
                raise TrainingError(
                    f"{problem}, and data.malformed is {self._malformed}: mend the sample, or set data.malformed to "
                    "causal, which trains it as plain text. If tools/preprocess_data.py accepted it, the kernels do "
                    "not work with this GPU or this version of Triton"
                )
            self._tell(sample, step, metrics, "scan", problem)
        self._parsed.clear()
        self._scanned.clear()

    def _tell(self, sample: int, step: int, metrics: MetricsWriter, found_by: str, problem: str) -> None:
        if sample in self._told:
            return
        self._told.add(sample)
        outcome = "dropped: none of its tokens are trained" if self._malformed == "drop" else "trained as plain text"
        logger.warning("%s; %s", problem, outcome)
        name = self._loader.sample_name(sample)
        metrics.write("malformed", step, sample=name, sample_id=sample, found_by=found_by, problem=problem)


class Placers:
    """The placers of an engine: `train` of the microbatches of its steps, `valid` of those of its validations, if it is
    given a loader of such. All else as for `TokenPlacer`."""

    def __init__(
        self, loader: Documents, valid_loader: Documents | None, device: torch.device, backend: str, malformed: str
    ) -> None:
        self.train = TokenPlacer(loader, device, backend, malformed)
        self._valid = None if valid_loader is None else TokenPlacer(valid_loader, device, backend, malformed)

    @property
    def valid(self) -> TokenPlacer:
        """The second of them."""
        assert self._valid is not None, "an engine that validates is built with a valid_loader"
        return self._valid

    def report(self, step: int, metrics: MetricsWriter) -> None:
        """See `TokenPlacer.report`."""
        for placer in (self.train, self._valid):
            if placer is not None:
                placer.report(step, metrics)


def raise_unless_equal(scan: StructureScan, batch: Microbatch) -> None:
    """A scan must be what the loader computed on the host (waits for the device).

    Raises:
        TrainingError: it is not: the kernels do not work with this GPU, driver or version of Triton.
    """
    pairs = (scan.r, batch["r"]), (scan.position_ids, batch["position_ids"])
    if all(torch.equal(mine.cpu().long(), theirs.cpu().long()) for mine, theirs in pairs):
        return
    flagged = int(scan.malformed.sum())
    raise TrainingError(
        "structure_scan and the loader disagree about a microbatch (positions or labels; the scan could not "
        f"read {flagged} documents that the parser accepted), which no data can cause: the kernels do not work with "
        "this GPU or this version of Triton. Run `pytest -m gpu tests/gpu/test_structure_scan_gpu.py` there and "
        "install triton>=3.6"
    )


def _merged(lists: list[list[int]]) -> list[int]:
    """All numbers, in order and without repetition."""
    return sorted(set(itertools.chain(*lists)))


def _flagged(seen: list[tuple[Tensor, Tensor]]) -> list[int]:
    """The sample ids whose flag is set, without repetition."""
    if not seen:
        return []
    ids = torch.cat([samples.flatten() for samples, _ in seen])
    flags = torch.cat([flags.flatten() for _, flags in seen]).cpu()
    return sorted({int(sample) for sample in ids[flags] if sample >= 0})
