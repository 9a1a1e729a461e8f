"""A few scans for compute-sanitizer, wild inputs among them:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize_structure_scan.py

Without torch's cache every buffer is an allocation of its own, so that a step past its end is seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_multiverse.kernels.structure_scan import structure_scan, structure_scan_reference
from tests.random_tags import TAG_IDS, random_pack

TAGS = torch.tensor(TAG_IDS)


def check(ids: torch.Tensor, documents: torch.Tensor) -> None:
    """One scan, equal to the reference."""
    got = structure_scan(ids.cuda(), documents.cuda(), TAGS.cuda())
    torch.cuda.synchronize()
    assert got.difference(structure_scan_reference(ids, documents, TAGS)) is None


def main() -> None:
    """Random packs, then random numbers instead of ids and documents."""
    for seed in range(6):
        pack = random_pack(seed, depth=1 + seed % 4)
        check(pack.ids[None], pack.documents[None])
    generator = torch.Generator().manual_seed(0)
    for length in (1, 127, 128, 511, 512, 513, 3000):
        ids = torch.randint(-(2**62), 2**62, (2, length), generator=generator)
        ids[:, ::2] = TAGS[torch.randint(0, 12, ids[:, ::2].shape, generator=generator)]
        for low, high in ((-(2**31), 2**31 - 1), (-5, length + 5)):
            check(ids, torch.randint(low, high, (2, 7, 2), generator=generator, dtype=torch.int32))
    print("scans done")


if __name__ == "__main__":
    main()
